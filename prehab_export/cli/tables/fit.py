"""The table of a fit on the terminal."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prehab_export.pipeline import FIT_HEADINGS, Row, fit_rows
from prehab_export.system import result_console


def print_fit(result: Row, folder: Path) -> None:
    """Print the table, the verdict and any warning on stdout."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for column, heading in enumerate(FIT_HEADINGS):
        table.add_column(heading, justify="right" if 0 < column < len(FIT_HEADINGS) - 1 else "left")
    for row in fit_rows(result):
        table.add_row(*row)
    console = result_console()
    console.print(table)
    console.print(result["verdict"])
    if result["warning"] is not None:
        console.print(f"warning: {result['warning']}", style="yellow")
    console.print(f"table, plot and model  {folder}")
