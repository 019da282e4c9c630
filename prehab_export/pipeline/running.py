"""Running a pipeline: check the input, then run each stage in order, except those with a valid result."""

import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from converters.publishing import publish_text
from prehab_export.config import RunConfig, plain_options, to_yaml
from prehab_export.pipeline.checks import check, disk_needed
from prehab_export.pipeline.dense_graph_choice import check_comparisons, choose_dense_graph
from prehab_export.pipeline.estimating import check_memory, estimate_stages
from prehab_export.pipeline.memory import BY_BLOCKS
from prehab_export.pipeline.preflight import check_export
from prehab_export.pipeline.session import Session, prepare_process
from prehab_export.pipeline.shared_stages import do_stage
from prehab_export.pipeline.stages.dependencies import enabled_parents
from prehab_export.pipeline.stages.table import STAGES, Stage
from prehab_export.pipeline.workspace import SOURCE, Workspace, stage_key, summaries
from prehab_export.system import ParityError, check_disk_space, return_freed_memory, say

# Stages that export the model to ONNX for the first time, so that a test export precedes them.
EXPORT_STAGES = ("export", "baseline")


def run(
    config: RunConfig,
    output: Path,
    *,
    until: str = "report",
    redo: Collection[str] = (),
) -> Workspace:
    """Bring the run's folder up to date with ``config``, through stage ``until``.

    A stage is skipped if a result exists for its current options, inputs and parents, even if other options were in
    use in between. A run that was killed continues after the last finished stage and produces the same artifact.

    Args:
        output: the run's folder: new, empty, or from an earlier run.
        until: the last stage to run.
        redo: stages to repeat even if they are up to date.

    Raises:
        InputError: the input is bad; this is found before any slow work.
        ParityError: the exported artifact does not compute what the model computes; nothing is published.
        StorageError: the disk is full.
    """
    with run_session(config, output, stages_through(until), redo) as session:
        update_through(session, until, redo)
    return session.workspace


@contextmanager
def run_session(
    config: RunConfig, output: Path, stages: Sequence[str] = (), redo: Collection[str] = ()
) -> Iterator[Session]:
    """Open a checked session with the run's folder locked, and hide results that do not match the options.

    Args:
        stages: the stages to bring up to date; if one of them exports the model, a test export runs first.
        redo: stages to repeat, which invalidates the stages that depend on them.

    Raises:
        InputError: the input is bad; this is found before any slow work.
    """
    with _checked_session(config, output, stages, redo) as session:
        session.workspace.save_options(to_yaml(config))
        _save_source(session)
        # A result to be replaced stays selected on disk until then, so that after a kill it is no leftover.
        select_valid(session)
        session.workspace.save_selection()
        select_valid(session, redo)
        yield session


@contextmanager
def side_session(
    config: RunConfig, output: Path, run_config: RunConfig, stages: Sequence[str] = ()
) -> Iterator[Session]:
    """Open a session like `run_session` for work beside a run, such as a sweep, that uses the run's stages.

    The run's saved options, current results and shown folders do not change.

    Args:
        config: the options of the work.
        run_config: the options of the run, which are saved if the folder has none.
        stages: as for `run_session`.

    Raises:
        InputError: the input is bad; this is found before any slow work.
    """
    with _checked_session(config, output, stages, repeated=BY_BLOCKS) as session:
        if session.workspace.has_options:
            session.workspace.saves_selection = False
        else:
            session.workspace.save_options(to_yaml(run_config))
            _save_source(session)
        yield session


@contextmanager
def _checked_session(
    config: RunConfig,
    output: Path,
    stages: Sequence[str],
    redo: Collection[str] = (),
    repeated: Sequence[str] = (),
) -> Iterator[Session]:
    """Open a checked session.

    Args:
        repeated: stages whose work is done several times beside the run.
    """
    prepare_process(config)
    workspace = Workspace.open(output)
    with workspace.locked():
        session = Session(config, workspace)
        check(session)
        session = select_with_dense_graph(session, redo)
        check_comparisons(session)
        if any(stage in EXPORT_STAGES and not session.workspace.has(stage) for stage in stages):
            check_export(session)
        disk_bytes = disk_needed(session)
        check_disk_space(output, disk_bytes)
        to_do = [name for name in stages if STAGES[name].is_enabled(config) and not workspace.has(name)]
        if to_do or repeated:
            estimate = estimate_stages(session, [*repeated, *stages], redo=repeated)
            if not repeated:  # how often is not known here
                say(estimate.sentence(disk_bytes))
            check_memory(session, estimate)
            session = session.within(estimate.limits)
        yield session


def select_with_dense_graph(session: Session, redo: Collection[str] = ()) -> Session:
    """Choose whether the run has a dense graph, and select the results that match (`select_valid`).

    Returns:
        The session with the choice.
    """

    def has_baseline(candidate: Session) -> bool:
        select_valid(candidate, redo)
        return candidate.workspace.has("baseline")

    session = session.without_dense_graph(choose_dense_graph(session, has_baseline))
    select_valid(session, redo)
    return session


def select_valid(session: Session, redo: Collection[str] = ()) -> None:
    """Select, for every stage, the result that matches the session's options.

    A stage has no current result if no result matches, if the stage is in ``redo``, or if a parent has none.
    """
    for stage in STAGES.values():
        key = None if stage.name in redo else _current_key(session, stage)
        folder = None if key is None else session.workspace.find(stage.name, key)
        session.workspace.select(stage.name, key if folder is not None else None)


def stages_through(until: str) -> list[str]:
    """Return the names of the stages up to and including this one, in execution order."""
    order = list(STAGES)
    return order[: order.index(until) + 1]


def update_through(session: Session, until: str, redo: Collection[str] = ()) -> None:
    """Run the stages through ``until`` that have no valid result, and those in ``redo``."""
    update_stages(session, stages_through(until), redo)


def update_stages(session: Session, names: Sequence[str], redo: Collection[str] = ()) -> None:
    """Run those of the named stages that have no valid result, and those in ``redo``.

    Args:
        names: stages in execution order; each stage's parents are among them or have current results.
    """
    workspace, remaining = session.workspace, set(redo)
    for stage in (STAGES[name] for name in names):
        key = _current_key(session, stage)
        if key is None:
            continue
        if stage.name not in remaining and workspace.find(stage.name, key) is not None:
            say(f"{stage.name}: up to date", style="dim")
            workspace.select(stage.name, key)
            continue
        try:
            _run_stage(session, stage, key)
        except ParityError:  # an earlier result under this key is now in doubt too
            workspace.discard(stage.name, key)
            workspace.save_selection()
            raise
        remaining.discard(stage.name)
        # If the repeated stage gave the same result as before, the results of later stages are still valid.
        select_valid(session, remaining)
        workspace.save_selection()


def _run_stage(session: Session, stage: Stage, key: str) -> None:
    start = time.monotonic()
    say(stage.name, style="bold")
    torch.manual_seed(session.config.seed)
    options, origin = stage.options(session.config), _origin(session, stage)
    with session.workspace.publish(stage.name, key, options, origin) as folder:
        do_stage(session, stage, folder)
    return_freed_memory()
    say(f"  done in {time.monotonic() - start:.1f} s")


def _current_key(session: Session, stage: Stage) -> str | None:
    """Return a stage's key, made from its options, the run's inputs and the current results of its parents.

    Returns:
        The key; None if the options disable the stage, or a parent has no current result.
    """
    if not stage.is_enabled(session.config):
        return None
    parents = enabled_parents(stage, session.config)
    if not all(session.workspace.has(parent) for parent in parents):
        return None
    facts = {**session.source, **stage.options(session.config), **stage.external_inputs(session)}
    return stage_key(stage.name, facts, [session.identity(parent) for parent in parents])


def _origin(session: Session, stage: Stage) -> dict[str, Any]:
    """Return everything that a result depends on, for its manifest; `staleness` explains stale results from it."""
    parents = {parent: session.identity(parent) for parent in enabled_parents(stage, session.config)}
    inputs = {**session.source, **stage.external_inputs(session)}
    return {"config": plain_options(session.config), "read": summaries(inputs), "parents": parents}


def _save_source(session: Session) -> None:
    """Record the content of the run's inputs, so that `status` need not read them."""
    missing = session.missing_dense_graph
    inputs = {**session.source, "evaluation": session.data.evaluation_fingerprint}
    inputs |= {"dense_graph": None} if missing is None else missing.inputs
    facts = {"config": plain_options(session.config), "read": summaries(inputs)}
    publish_text(session.workspace.root / SOURCE, json.dumps(facts, indent=1) + "\n")
