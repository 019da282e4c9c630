"""The summary of a finished command on the terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from prehab_export.pipeline import REPORT_VERBS, Workspace, describe_sizes, read_result
from prehab_export.system import result_console


def print_summary(workspace: Workspace, verb: str) -> None:
    """Print a verb's result on stdout. A complete run shows its cost, its gain and the places of its files."""
    console = result_console()
    result = read_result(workspace, verb)
    if verb in REPORT_VERBS:
        console.print(_comparison(result))
        for warning in result["size_warnings"]:
            console.print(f"warning: {warning}", style="yellow")
        _print_speed(console, result)
        _print_paths(console, workspace)
    elif result.get("skipped"):
        console.print(f"{verb}: skipped, the options do not ask for it")
    else:
        folder = workspace.root / "artifact" if verb == "verify" else workspace.folder(verb)
        console.print(f"{verb}: done, in {folder}")


def _comparison(result: dict[str, Any]) -> Table:
    metrics, truncation = result["verify"]["metrics"], result["truncate"]
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for heading in ("", "dense", "compressed"):
        table.add_column(heading, justify="left" if not heading else "right")
    has_graph = "missing_graph" not in result["baseline"]
    dense = metrics["dense_onnx" if has_graph else "dense_pytorch"]
    table.add_row(result["metric"]["name"], *(f"{row['value']:.4f}" for row in (dense, metrics["compressed_onnx"])))
    for key, label in (("selected", "parameters, selected layers"), ("total", "parameters, whole model")):
        counts = [f"{truncation[f'{key}_parameters_{side}']:,}" for side in ("before", "after")]
        table.add_row(label, *counts)
    table.add_row("selected share of the whole model", f"{truncation['coverage']['selected_share']:.1%}", "")
    weights = (f"{result[side]['weight_bytes'] / 1e6:.2f} {result[side]['dtype']}" for side in ("baseline", "export"))
    table.add_row("weight files, MB", *weights)
    dense_size = f"{result['baseline']['bytes'] / 1e6:.2f}" if has_graph else "no dense graph"
    table.add_row("ONNX file, MB", dense_size, f"{result['export']['bytes'] / 1e6:.2f}")
    return table


def _print_speed(console: Console, result: dict[str, Any]) -> None:
    from prehab_export.cli.tables.bench import format_bench

    console.print(format_bench(result["bench"]))
    if (reason := result["baseline"].get("missing_graph")) is not None:
        console.print(f"no dense graph to compare with: {reason}; the dense model was evaluated in PyTorch")
    for row in result["bench"]["comparison"]:
        if row["model"].startswith("compressed") and row["speedup"] < 1:
            console.print(
                f"{row['model']} is slower than dense {describe_sizes(row)}: {row['speedup']:.2f}×", style="yellow"
            )


def _print_paths(console: Console, workspace: Workspace) -> None:
    root = workspace.root
    console.print(f"artifact  {root / 'artifact'}")
    console.print(f"report    {root / 'report' / 'report.md'}")
    if leftovers := workspace.leftovers():
        size = sum(leftover.bytes for leftover in leftovers)
        note = f"results of earlier options: {size / 1e6:,.0f} MB; to remove them, run prehab-export clean {root}"
        console.print(note, style="dim")
