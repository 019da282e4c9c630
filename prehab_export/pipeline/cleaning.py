"""``clean``: take away what no current option of a run needs."""

from pathlib import Path

from converters.errors import InputError
from prehab_export.pipeline.workspace import Leftover, Workspace


def clean_run(output: Path, *, dry_run: bool = False) -> list[Leftover]:
    """Remove results of earlier options, and what fits and sweeps keep to go on with; returns what was removed, or
    would be.

    Raises:
        InputError: not the folder of a run, or another process is working in it.
    """
    workspace = Workspace.existing(output)
    if workspace is None:
        raise InputError(f"{output} is not the folder of a run")
    with workspace.locked():
        leftovers = workspace.leftovers()
        if not dry_run:
            for leftover in leftovers:
                workspace.remove(leftover)
            workspace.forget_missing()
    return leftovers
