"""``clean``: take away what no current option of a run needs."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from converters.errors import InputError
from prehab_export.progress import result_console
from prehab_export.workspace import Leftover, Workspace


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


def print_cleaning(removed: list[Leftover], dry_run: bool) -> None:
    console = result_console()
    if not removed:
        console.print("nothing to remove: every result answers to the current options")
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("result")
    table.add_column("MB", justify="right")
    for leftover in removed:
        table.add_row(f"{leftover.stage}/{leftover.key}", f"{leftover.bytes / 1e6:,.1f}")
    console.print(table)
    total = sum(leftover.bytes for leftover in removed)
    console.print(f"{'would free' if dry_run else 'freed'} {total / 1e6:,.1f} MB")
