"""What a run's folder holds, for the terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prehab_export.pipeline import RunStatus, describe_difference
from prehab_export.system import result_console

STYLES = {"current": "green", "stale": "yellow", "missing": "red", "not wanted": "dim"}


def print_status(found: RunStatus) -> None:
    console, config = result_console(), found.config
    console.print(f"{found.output}: {config.model}, {config.task}, {config.data.data}")
    for note in found.notes:
        console.print(f"warning: {note}", style="yellow")
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for heading in ("stage", "state", "made (UTC)", "took", "MB", "why"):
        table.add_column(heading, justify="right" if heading in ("took", "MB") else "left", overflow="fold")
    for row in found.stages:
        made = "" if row.made is None else row.made[:16].replace("T", " ")
        took = "" if row.seconds is None else f"{row.seconds:,.0f} s"
        size = f"{row.bytes / 1e6:,.1f}" if row.made is not None else ""
        why = "; ".join([*map(describe_difference, row.reasons.options), *row.reasons.others])
        table.add_row(row.stage, row.state, made, took, size, why, style=STYLES[row.state])
    console.print(table)
    for name, target in found.targets.items():
        where = target["cpu"] or "unnamed CPU"
        console.print(f"measured elsewhere: {name} ({where}), {target['measured'][:16].replace('T', ' ')}")
    if found.fit is not None:
        console.print(f"fit: {found.fit}")
    if found.sweep is not None:
        ratios = ", ".join(f"{ratio:g}" for ratio in found.sweep["ratio"])
        console.print(f"sweep: {', '.join(found.sweep['method'])} at {ratios}")
    if found.kept:
        parts = ", ".join(f"{kept.stage} {kept.bytes / 1e6:,.1f} MB" for kept in found.kept)
        console.print(f"kept for other options, fits and sweeps: {parts}", style="dim")
        console.print(f"prehab-export clean {found.output} frees that", style="dim")
    if any(row.state in ("stale", "missing") for row in found.stages):
        console.print(f"prehab-export run {found.output} --dry-run tells what bringing it up to date would take")
