"""The list of removed results on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prehab_export.pipeline import Leftover
from prehab_export.system import result_console


def print_cleaning(removed: list[Leftover], dry_run: bool) -> None:
    """Print the removed results and their sizes on stdout."""
    console = result_console()
    if not removed:
        console.print("nothing to remove: every result matches the current options")
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("result")
    table.add_column("MB", justify="right")
    for leftover in removed:
        table.add_row(f"{leftover.stage}/{leftover.key}", f"{leftover.bytes / 1e6:,.1f}")
    console.print(table)
    total = sum(leftover.bytes for leftover in removed)
    console.print(f"{'would free' if dry_run else 'freed'} {total / 1e6:,.1f} MB")
