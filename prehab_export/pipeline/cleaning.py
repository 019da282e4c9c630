"""``clean``: remove the results that a run's current options do not need."""

from pathlib import Path

from converters.errors import InputError
from prehab_export.pipeline.workspace import Leftover, Workspace


def clean_run(output: Path, *, dry_run: bool = False) -> list[Leftover]:
    """Remove results of earlier options and the intermediate results of fits and sweeps.

    Args:
        output: the run's folder.
        dry_run: remove nothing.

    Returns:
        The results that were removed, or would be in a dry run.

    Raises:
        InputError: the folder is not a run's, or another process is working in it.
    """
    workspace = Workspace.open_existing(output)
    if workspace is None:
        raise InputError(f"{output} is not the folder of a run")
    with workspace.locked():
        leftovers = workspace.leftovers()
        if not dry_run:
            for leftover in leftovers:
                workspace.remove(leftover)
            workspace.prune()
    return leftovers
