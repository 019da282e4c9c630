"""A run from start to end: check, then one stage after another, skipping what is already there and still valid."""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from prehab_export.config import RunConfig, to_yaml
from prehab_export.preflight import check_export
from prehab_export.progress import say
from prehab_export.session import Session, check, prepare_process
from prehab_export.stages import STAGES, Stage
from prehab_export.workspace import Workspace, stage_key

# Stages that write an ONNX graph of a model whose like has not been exported before.
EXPORTING = ("export", "baseline")


def run(
    config: RunConfig,
    output: Path,
    *,
    until: str = "report",
    redo: Collection[str] = (),
) -> Workspace:
    """Bring the run's folder up to date with ``config``, through stage ``until``.

    Stages whose options, inputs and earlier stages are unchanged are skipped; a run that was killed goes on after
    the last finished stage and ends in the same artifact.

    Args:
        output: the run's folder; new, empty, or of an earlier run.
        redo: stages to do again although they are up to date.

    Raises:
        InputError: bad input, found before anything slow.
        ParityError: the exported artifact does not compute what the model computes; nothing is published.
    """
    with opened(config, output, _through(until)) as session:
        _withdraw_outdated(session, redo)
        bring_up_to_date(session, until, redo)
    return session.workspace


@contextmanager
def opened(config: RunConfig, output: Path, stages: Sequence[str] = ()) -> Iterator[Session]:
    """A checked session whose folder nobody else works in.

    stages: what is to be brought up to date in it; where the model is exported on the way, that is tried first.

    Raises:
        InputError: bad input, found before anything slow.
    """
    prepare_process(config)
    workspace = Workspace.open(output)
    with workspace.locked():
        session = Session(config, workspace)
        check(session)
        if _exports_anew(session, stages):
            check_export(session)
        workspace.save_options(to_yaml(config))
        yield session


def _withdraw_outdated(session: Session, redo: Collection[str]) -> None:
    workspace, keys = session.workspace, stage_keys(session)
    for name in set(STAGES) - set(keys):
        workspace.withdraw(name)  # of other options; nothing may read it by mistake
    # What no longer answers to these options must not stand there looking finished while the work goes on.
    for name in ("artifact", "report"):
        if name in redo or not workspace.is_current(name, keys[name]):
            workspace.withdraw(name)


def _through(until: str) -> list[str]:
    order = list(STAGES)
    return order[: order.index(until) + 1]


def _exports_anew(session: Session, stages: Sequence[str]) -> bool:
    """Whether a graph is to be written that is not there yet: what has been exported once can be exported."""
    keys = stage_keys(session)
    return any(not session.workspace.is_current(name, keys[name]) for name in EXPORTING if name in stages)


def bring_up_to_date(session: Session, until: str, redo: Collection[str] = ()) -> None:
    """Do the stages through ``until`` that are not there yet, or were made under other options."""
    bring_up(session, _through(until), redo)


def bring_up(session: Session, names: Sequence[str], redo: Collection[str] = ()) -> None:
    """`bring_up_to_date` of these stages alone, which come after those that they read."""
    workspace, keys = session.workspace, stage_keys(session)
    stale = [name for name in keys if name in redo or not workspace.is_current(name, keys[name])]
    for name in names:
        if name in stale:
            _do(session, STAGES[name], keys[name])
        elif name in keys:
            say(f"[dim]{name}: up to date")


def _do(session: Session, stage: Stage, key: str) -> None:
    started = time.monotonic()
    say(f"[bold]{stage.name}")
    torch.manual_seed(session.config.seed)
    with session.workspace.publish(stage.name, key, stage.options(session.config)) as folder:
        stage.work(session, folder)
    say(f"  done in {time.monotonic() - started:.1f} s")


def stage_keys(session: Session) -> dict[str, str]:
    """The key of every wanted stage: its options, what the run starts from, and the keys of the stages it reads."""
    keys: dict[str, str] = {}
    for stage in STAGES.values():
        if stage.wanted(session.config):
            parents = [keys[name] for name in stage.parents if name in keys]
            keys[stage.name] = stage_key(stage.name, session.source | dict(stage.options(session.config)), parents)
    return keys


__all__ = ["Stage", "bring_up", "bring_up_to_date", "opened", "run", "stage_keys"]
