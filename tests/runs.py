"""The folder of a run, as tests look into it."""

from pathlib import Path

from prehab_export.pipeline.workspace import Workspace


def stage_folder(output: Path, stage: str) -> Path:
    """Where the current result of a stage lies."""
    workspace = Workspace.open_existing(output)
    assert workspace is not None
    return workspace.folder(stage)


def has_stage(output: Path, stage: str) -> bool:
    """Whether the stage has a result that answers to the run's options."""
    workspace = Workspace.open_existing(output)
    return workspace is not None and workspace.has(stage)
