"""The forecast of a command on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prehab_export.pipeline import Forecast
from prehab_export.system import format_bytes, format_duration, result_console


def print_forecast(forecast: Forecast) -> None:
    """Print the ranks, sizes, stages, disk space, memory and time of a run on stdout."""
    console = result_console()
    console.print(forecast.coverage.sentence())
    console.print(_layer_table(forecast))
    console.print(_size_table(forecast))
    console.print(_stage_table(forecast))
    disk, free_disk = format_bytes(forecast.disk_bytes), format_bytes(forecast.disk_free_bytes)
    memory, free_memory = format_bytes(forecast.memory_bytes), format_bytes(forecast.memory_free_bytes)
    mapped = f", of which {format_bytes(forecast.mapped_bytes)} are mapped files" if forecast.mapped_bytes else ""
    time = format_duration(forecast.seconds)
    console.print(f"disk: about {disk} more, {free_disk} free")
    console.print(f"memory: about {memory} at peak{mapped}, {free_memory} free")
    console.print(f"time: about {time} at the current speed of this machine, within a factor of about 2")
    for note in forecast.notes:
        console.print(f"note: {note}")
    if any(stage.state == "if changed" for stage in forecast.stages):
        console.print("if changed: runs only if an earlier stage gives a different result; not included in the time")
    console.print("nothing was written", style="dim")


def _layer_table(forecast: Forecast) -> Table:
    table = Table(title=f"ranks: {forecast.ranks_from}", box=SIMPLE_HEAD, show_edge=False, title_justify="left")
    for heading in ("layers", "", "out×in", "rank"):
        table.add_column(heading, justify="left" if heading == "layers" else "right", overflow="fold")
    for row in forecast.layers:
        rank = "?" if forecast.selected.after is None else "dense"
        if row.ranks is not None:
            low, high = row.ranks
            rank = f"{low}" if low == high else f"{low}–{high}"
        table.add_row(row.kind, f"×{row.layers}", "×".join(map(str, row.shape)), rank)
    return table


def _size_table(forecast: Forecast) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for heading in ("", "dense", "compressed"):
        table.add_column(heading, justify="right" if heading else "left")
    counts = ((forecast.selected, "parameters, selected layers"), (forecast.total, "parameters, whole model"))
    for size, label in counts:
        table.add_row(label, f"{size.before:,}", "?" if size.after is None else f"{size.after:,}")
    for size in forecast.sizes:
        after = "?" if size.after is None else f"{size.after / 1e6:.1f}"
        table.add_row(f"{size.name}, MB", f"{size.before / 1e6:.1f}", after)
    return table


def _stage_table(forecast: Forecast) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for heading in ("stage", "", "time", "memory"):
        table.add_column(heading, justify="right" if heading in ("time", "memory") else "left")
    for row in forecast.stages:
        time = "" if row.seconds is None else format_duration(row.seconds)
        memory = "" if row.memory_bytes is None else format_bytes(row.memory_bytes)
        table.add_row(row.stage, row.state, time, memory, style=None if row.state == "to do" else "dim")
    return table
