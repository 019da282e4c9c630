"""The status of a run on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prehab_export.pipeline import RunStatus, describe_difference
from prehab_export.system import result_console

STYLES = {"current": "green", "stale": "yellow", "missing": "red", "not wanted": "dim"}


def print_status(status: RunStatus) -> None:
    """Print the state of every stage of a run, and its other results, on stdout."""
    console, config = result_console(), status.config
    console.print(f"{status.output}: {config.model}, {config.task}, {config.data.data}")
    for note in status.notes:
        console.print(f"warning: {note}", style="yellow")
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for heading in ("stage", "state", "created (UTC)", "duration", "MB", "reasons"):
        table.add_column(heading, justify="right" if heading in ("duration", "MB") else "left", overflow="fold")
    for row in status.stages:
        created = "" if row.made is None else row.made[:16].replace("T", " ")
        duration = "" if row.seconds is None else f"{row.seconds:,.0f} s"
        size = f"{row.bytes / 1e6:,.1f}" if row.made is not None else ""
        reasons = "; ".join([*map(describe_difference, row.reasons.options), *row.reasons.others])
        table.add_row(row.stage, row.state, created, duration, size, reasons, style=STYLES[row.state])
    console.print(table)
    for name, target in status.targets.items():
        device = target["cpu"] or "unnamed CPU"
        console.print(f"measured elsewhere: {name} ({device}), {target['measured'][:16].replace('T', ' ')}")
    if status.fit is not None:
        console.print(f"fit: {status.fit}")
    if status.sweep is not None:
        ratios = ", ".join(f"{ratio:g}" for ratio in status.sweep["ratio"])
        console.print(f"sweep: {', '.join(status.sweep['method'])} at {ratios}")
    if status.kept:
        parts = ", ".join(f"{results.stage} {results.bytes / 1e6:,.1f} MB" for results in status.kept)
        console.print(f"results kept for other options, fits and sweeps: {parts}", style="dim")
        console.print(f"to remove them, run prehab-export clean {status.output}", style="dim")
    if any(row.state in ("stale", "missing") for row in status.stages):
        console.print(f"to see what an update would take, run prehab-export run {status.output} --dry-run")
