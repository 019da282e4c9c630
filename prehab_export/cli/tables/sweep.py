"""The table of a sweep on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prehab_export.pipeline import Row, sweep_cells
from prehab_export.system import result_console


def print_sweep(dense: Row, rows: list[Row]) -> None:
    """Print the metric of each method at each ratio on stdout."""
    headings, cells = sweep_cells(dense, rows)
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="right" if column else "left")
    for row in cells:
        table.add_row(*row)
    result_console().print(table)
