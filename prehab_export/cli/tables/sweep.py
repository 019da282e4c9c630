"""A sweep's table for the terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prehab_export.pipeline import Row, sweep_cells
from prehab_export.system import result_console


def print_sweep(dense: Row, rows: list[Row]) -> None:
    """The table on stdout."""
    heading, body = sweep_cells(dense, rows)
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for at, text in enumerate(heading):
        table.add_column(text, justify="right" if at else "left")
    for line in body:
        table.add_row(*line)
    result_console().print(table)
