"""A fit's table for the terminal."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prehab_export.pipeline import HEADINGS, Row, lines_of
from prehab_export.system import result_console


def print_fit(result: Row, folder: Path) -> None:
    """Verdict and table on stdout."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for at, text in enumerate(HEADINGS):
        table.add_column(text, justify="right" if 0 < at < len(HEADINGS) - 1 else "left")
    for line in lines_of(result):
        table.add_row(*line)
    console = result_console()
    console.print(table)
    console.print(result["verdict"])
    if result["warning"] is not None:
        console.print(f"warning: {result['warning']}", style="yellow")
    console.print(f"table, plot and model  {folder}")
