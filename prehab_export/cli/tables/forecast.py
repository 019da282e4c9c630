"""What a command would do, for the terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prehab_export.pipeline import Forecast
from prehab_export.system import result_console


def print_forecast(found: Forecast) -> None:
    console = result_console()
    console.print(found.coverage.sentence())
    console.print(_layers(found))
    console.print(_sizes(found))
    console.print(_stages(found))
    console.print(
        f"disk: about {_gigabytes(found.disk_bytes)} more, {_gigabytes(found.disk_free_bytes)} are free\n"
        f"memory: about {_gigabytes(found.memory_bytes)} at most, {_gigabytes(found.memory_free_bytes)} are free\n"
        f"time: about {duration(found.seconds)} at the pace of this machine now, within a factor of about 2"
    )
    for note in found.notes:
        console.print(f"note: {note}")
    if any(stage.state == "if changed" for stage in found.stages):
        console.print("if changed: only where what is done again before it comes out otherwise; not in the time")
    console.print("nothing was written", style="dim")


def _layers(found: Forecast) -> Table:
    table = Table(title=f"ranks: {found.ranks_from}", box=SIMPLE_HEAD, show_edge=False, title_justify="left")
    for heading in ("layers", "", "out×in", "rank"):
        table.add_column(heading, justify="left" if heading == "layers" else "right", overflow="fold")
    for row in found.layers:
        rank = "?" if found.selected.after is None else "dense"
        if row.ranks is not None:
            low, high = row.ranks
            rank = f"{low}" if low == high else f"{low}–{high}"
        table.add_row(row.kind, f"×{row.layers}", "×".join(map(str, row.shape)), rank)
    return table


def _sizes(found: Forecast) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for heading in ("", "dense", "compressed"):
        table.add_column(heading, justify="right" if heading else "left")
    for size, words in ((found.selected, "parameters, selected layers"), (found.total, "parameters, whole model")):
        table.add_row(words, f"{size.before:,}", "?" if size.after is None else f"{size.after:,}")
    for size in found.sizes:
        after = "?" if size.after is None else f"{size.after / 1e6:.1f}"
        table.add_row(f"{size.name}, MB", f"{size.before / 1e6:.1f}", after)
    return table


def _stages(found: Forecast) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for heading in ("stage", "", "time", "memory"):
        table.add_column(heading, justify="right" if heading in ("time", "memory") else "left")
    for row in found.stages:
        time = "" if row.seconds is None else duration(row.seconds)
        held = "" if row.memory_bytes is None else _gigabytes(row.memory_bytes)
        table.add_row(row.stage, row.state, time, held, style=None if row.state == "to do" else "dim")
    return table


def duration(seconds: float) -> str:
    """In two figures at most: an estimate has no more.

    >>> duration(0.4), duration(47), duration(400), duration(12_000), duration(400_000)
    ('1 s', '47 s', '7 min', '3.3 h', '110 h')
    """
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    if seconds < 6000:
        return f"{round(seconds / 60)} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 10 else f"{float(f'{hours:.2g}'):.0f} h"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
