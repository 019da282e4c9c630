"""What the command line says when a stage is done."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from prehab_export.errors import BudgetError
from prehab_export.progress import result_console
from prehab_export.report import STAGE_FACTS
from prehab_export.workspace import Workspace

# Verbs that end in a report.
WHOLE_RUNS = ("run", "report", "demo")


def result_of(workspace: Workspace, verb: str) -> dict[str, Any]:
    """The JSON that a verb's stage left: of ``report`` all there is, of ``export`` the dense twin's beside its own."""
    if verb in WHOLE_RUNS:
        return workspace.read_json("report", "report.json")
    if not workspace.has(verb):
        return {"stage": verb, "skipped": True}
    facts = workspace.read_json(verb, STAGE_FACTS[verb])
    return facts | {"baseline": workspace.read_json("baseline", STAGE_FACTS["baseline"])} if verb == "export" else facts


def print_summary(workspace: Workspace, verb: str) -> None:
    """A few lines on stdout: what it cost, what it gained, where things lie."""
    console = result_console()
    result = result_of(workspace, verb)
    if verb in WHOLE_RUNS:
        console.print(_table(result))
        for warning in result["size_warnings"]:
            console.print(f"warning: {warning}", style="yellow")
        _print_speed(console, result)
        _print_places(console, workspace)
    elif result.get("skipped"):
        console.print(f"{verb}: skipped, not asked for")
    else:
        place = workspace.root / "artifact" if verb == "verify" else workspace.folder(verb)
        console.print(f"{verb}: done, in {place}")


def check_speed(workspace: Workspace, least: float) -> None:
    """Raises:
    BudgetError: a compressed graph is less than ``least`` times as fast as the dense float32 one.
    """
    slow = [
        f"{row['model']} {row['speedup']:.2f}× {_sizes(row)}"
        for row in result_of(workspace, "bench")["comparison"]
        if row["model"].startswith("compressed") and row["speedup"] < least
    ]
    if slow:
        raise BudgetError(f"less than --min-speedup {least:g}: {'; '.join(slow)}; the figures are in the run's folder")


def _sizes(row: dict[str, Any]) -> str:
    return f"at batch {row['batch']}" + (f", length {row['sequence']}" if row["sequence"] else "")


def _table(result: dict[str, Any]) -> Table:
    metrics, truncation = result["verify"]["metrics"], result["truncate"]
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for heading in ("", "dense", "compressed"):
        table.add_column(heading, justify="left" if not heading else "right")
    for kind, label in (("pytorch", "PyTorch"), ("onnx", "ONNX Runtime")):
        values = [f"{metrics[f'{side}_{kind}']['value']:.4f}" for side in ("dense", "compressed")]
        table.add_row(f"{result['metric']['name']}, {label}", *values)
    for key, label in (("targeted", "parameters, targeted layers"), ("total", "parameters, whole model")):
        counts = [f"{truncation[f'{key}_parameters_{side}']:,}" for side in ("before", "after")]
        table.add_row(label, *counts)
    table.add_row("targeted share of the whole model", f"{truncation['coverage']['targeted_share']:.1%}", "")
    weights = (f"{result[side]['weight_bytes'] / 1e6:.2f} {result[side]['dtype']}" for side in ("baseline", "export"))
    table.add_row("weight files, MB", *weights)
    table.add_row("ONNX file, MB", *(f"{result[side]['bytes'] / 1e6:.2f}" for side in ("baseline", "export")))
    return table


def _print_speed(console: Console, result: dict[str, Any]) -> None:
    from prehab_export.bench_table import format_bench

    console.print(format_bench(result["bench"]))
    for row in result["bench"]["comparison"]:
        if row["model"].startswith("compressed") and row["speedup"] < 1:
            console.print(f"{row['model']} is slower than dense {_sizes(row)}: {row['speedup']:.2f}×", style="yellow")


def _print_places(console: Console, workspace: Workspace) -> None:
    root = workspace.root
    console.print(f"artifact  {root / 'artifact'}")
    console.print(f"report    {root / 'report' / 'report.md'}")
    if leftovers := workspace.leftovers():
        size = sum(leftover.bytes for leftover in leftovers)
        told = f"kept for options used before: {size / 1e6:,.0f} MB; prehab-export clean {root} frees them"
        console.print(told, style="dim")
