"""A run from start to end: check, then one stage after another, skipping what is already there and still valid."""

import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from converters.publishing import publish_text
from prehab_export.config import RunConfig, plain_options, to_yaml
from prehab_export.pipeline.checks import check, disk_estimate
from prehab_export.pipeline.preflight import check_export
from prehab_export.pipeline.session import Session, prepare_process
from prehab_export.pipeline.stages.dependencies import wanted_parents
from prehab_export.pipeline.stages.table import STAGES, Stage
from prehab_export.pipeline.workspace import SOURCE, Workspace, stage_key, summaries
from prehab_export.system import ParityError, check_disk_space, say

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

    Stages whose options, inputs and earlier stages are unchanged are skipped, and so are those that were made under
    these options before others were tried; a run that was killed goes on after the last finished stage and ends in the
    same artifact.

    Args:
        output: the run's folder; new, empty, or of an earlier run.
        redo: stages to do again although they are up to date.

    Raises:
        InputError: bad input, found before anything slow.
        ParityError: the exported artifact does not compute what the model computes; nothing is published.
        StorageError: the disk is full.
    """
    with opened(config, output, through(until), redo) as session:
        bring_up_to_date(session, until, redo)
    return session.workspace


@contextmanager
def opened(
    config: RunConfig, output: Path, stages: Sequence[str] = (), redo: Collection[str] = ()
) -> Iterator[Session]:
    """A checked session whose folder nobody else works in; what no longer answers to the options is out of sight.

    Args:
        stages: what is to be brought up to date in it; where the model is exported on the way, that is tried first.
        redo: stages that will be done again, so that what depends on them does not count as valid.

    Raises:
        InputError: bad input, found before anything slow.
    """
    with _checked(config, output, stages, redo) as session:
        session.workspace.save_options(to_yaml(config))
        _save_source(session)
        # What is to be done again stays as it is until that has been done: a kill before must not make leftovers of it.
        select_valid(session)
        session.workspace.save_selection()
        select_valid(session, redo)
        yield session


@contextmanager
def opened_beside(config: RunConfig, output: Path, given: RunConfig, stages: Sequence[str] = ()) -> Iterator[Session]:
    """`opened`, for work that lies beside a run and uses its stages: the run's own options, the results that answer
    to them and what is shown stay as they are.

    Args:
        config: the options of this work.
        given: what the user asked for; becomes the run's options where the folder has none.
        stages: as of `opened`.

    Raises:
        InputError: bad input, found before anything slow.
    """
    with _checked(config, output, stages) as session:
        if session.workspace.has_options:
            session.workspace.keeps_selection = False
        else:
            session.workspace.save_options(to_yaml(given))
            _save_source(session)
        yield session


@contextmanager
def _checked(config: RunConfig, output: Path, stages: Sequence[str], redo: Collection[str] = ()) -> Iterator[Session]:
    prepare_process(config)
    workspace = Workspace.open(output)
    with workspace.locked():
        session = Session(config, workspace)
        check(session)
        select_valid(session, redo)
        if any(stage in EXPORTING and not session.workspace.has(stage) for stage in stages):
            check_export(session)
        there = sum(workspace.size(stage, key) for stage, key in workspace.current.items())
        check_disk_space(output, disk_estimate(session) - there)
        yield session


def select_valid(session: Session, redo: Collection[str] = ()) -> None:
    """Make current, of every stage, the result that answers to the session's options: none where there is none, where
    it is to be done again, or where that holds for a stage that it reads."""
    for stage in STAGES.values():
        key = None if stage.name in redo else _key(session, stage)
        found = None if key is None else session.workspace.find(stage.name, key)
        session.workspace.select(stage.name, key if found is not None else None)


def through(until: str) -> list[str]:
    """The stages up to this one, in their order."""
    order = list(STAGES)
    return order[: order.index(until) + 1]


def bring_up_to_date(session: Session, until: str, redo: Collection[str] = ()) -> None:
    """Do the stages through ``until`` that are not there yet, or were made under other options."""
    bring_up(session, through(until), redo)


def bring_up(session: Session, names: Sequence[str], redo: Collection[str] = ()) -> None:
    """`bring_up_to_date` of these stages alone, which come after those that they read."""
    workspace, left = session.workspace, set(redo)
    for stage in (STAGES[name] for name in names):
        key = _key(session, stage)
        if key is None:
            continue
        if stage.name not in left and workspace.find(stage.name, key) is not None:
            say(f"{stage.name}: up to date", style="dim")
            workspace.select(stage.name, key)
            continue
        try:
            _do(session, stage, key)
        except ParityError:  # what was found here before does not hold either, nor what rests on it
            workspace.discard(stage.name, key)
            workspace.save_selection()
            raise
        left.discard(stage.name)
        # What was done again may have come out the same, and what stands after it is then valid as it is.
        select_valid(session, left)
        workspace.save_selection()


def _do(session: Session, stage: Stage, key: str) -> None:
    started = time.monotonic()
    say(stage.name, style="bold")
    torch.manual_seed(session.config.seed)
    options, origin = stage.options(session.config), _origin(session, stage)
    with session.workspace.publish(stage.name, key, options, origin) as folder:
        stage.work(session, folder)
    say(f"  done in {time.monotonic() - started:.1f} s")


def _key(session: Session, stage: Stage) -> str | None:
    """A stage's key: its options, what the run starts from, and the current results of the stages that it reads; None
    where it is not wanted, or one of these has no result yet."""
    if not stage.wanted(session.config):
        return None
    parents = wanted_parents(stage, session.config)
    if not all(session.workspace.has(parent) for parent in parents):
        return None
    read = {**session.source, **stage.options(session.config), **stage.outside(session)}
    return stage_key(stage.name, read, [session.identity(parent) for parent in parents])


def _origin(session: Session, stage: Stage) -> dict[str, Any]:
    """What a result is made from, for its manifest: whoever asks later why it no longer counts is answered from it."""
    parents = {parent: session.identity(parent) for parent in wanted_parents(stage, session.config)}
    read = {**session.source, **stage.outside(session)}
    return {"config": plain_options(session.config), "read": summaries(read), "parents": parents}


def _save_source(session: Session) -> None:
    """Remember what the run starts from, for those who ask without reading it again."""
    read = {**session.source, "evaluation": session.data.evaluation_fingerprint}
    told = {"config": plain_options(session.config), "read": summaries(read)}
    publish_text(session.workspace.root / SOURCE, json.dumps(told, indent=1) + "\n")
