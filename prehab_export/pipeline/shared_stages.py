"""Stages whose work several processes share out.

The first process runs the command: it alone checks the input, decides which stages are out of date, holds the lock of
the run's folder and writes to it. The others follow. For a stage in `SHARED_STAGES`, the first process sends them what
it works on; they do the same work with it, and write nothing. All other stages are the first process's alone, while
the others wait.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prehab_export.config import RunConfig, from_dict
from prehab_export.pipeline.session import Session, prepare_process
from prehab_export.pipeline.stages.table import STAGES, Stage
from prehab_export.pipeline.workspace import Workspace
from prehab_export.system import everyone, mute, team, together

SHARED_STAGES = frozenset({"calibrate", "prehab", "truncate", "refine", "rehab"})


@dataclass(frozen=True)
class _SharedStage:
    """A stage to do together.

    stage: its name.
    config: the options of the run, in JSON types.
    root: the run's folder.
    current: the current results in it.
    folder: the folder that the first process writes to.
    unfinished: the folder of the parts of its result.
    """

    stage: str
    config: dict[str, Any]
    root: Path
    current: dict[str, str]
    folder: Path
    unfinished: Path


def do_stage(session: Session, stage: Stage, folder: Path) -> None:
    """Do a stage's work, together with the other processes if it is shared out.

    Raises:
        ProcessError: another process has ended.
    """
    # Blocks are refined on the whole sample, which only one process has.
    refines_blocks = stage.name == "truncate" and session.config.refine.block_steps > 0
    if everyone().size == 1 or stage.name not in SHARED_STAGES or refines_blocks:
        stage.work(session, folder)
        return
    workspace = session.workspace
    root, folder, unfinished = (path.absolute() for path in (workspace.root, folder, workspace.unfinished))
    work = _SharedStage(stage.name, asdict(session.config), root, workspace.current, folder, unfinished)
    everyone().from_first(work)
    _do_together(session, stage, folder)


def follow_first_process() -> None:
    """Share in the stages of the first process until it is done (`dismiss_processes`).

    Raises:
        ProcessError: another process has ended.
    """
    mute()
    session: Session | None = None
    while (work := everyone().from_first(_no_work())) is not None:
        config = from_dict(RunConfig, work.config)
        if session is None or session.config != config:  # otherwise the data need not be read again
            prepare_process(config)
            session = Session(config, Workspace(work.root, writable=False))
        session.workspace.current = work.current
        session.workspace.share_unfinished(work.unfinished)
        _do_together(session, STAGES[work.stage], work.folder)


def dismiss_processes() -> None:
    """Let the processes that follow this one end."""
    everyone().from_first(_no_work())


def _no_work() -> _SharedStage | None:
    return None


def _do_together(session: Session, stage: Stage, folder: Path) -> None:
    with together():
        stage.work(session, folder)
        team().wait()  # the folder is moved to its place when nobody reads it any more
