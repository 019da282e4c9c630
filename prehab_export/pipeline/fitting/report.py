"""What a fit leaves to read: ``fit.json``, ``fit.md`` and a plot, and its table on stdout."""

from pathlib import Path
from typing import Any

from prehab_export.pipeline.report.plots import plot_fit
from prehab_export.system import render, write_json

Row = dict[str, Any]

HEADINGS = ("", "drop", "p50 ms", "p95 ms", "memory MB", "file MB", "predicted p50 ms", "")


def write_fit(result: Row, folder: Path) -> None:
    """Everything as JSON, the table as Markdown, and the plot."""
    write_json(folder / "fit.json", result)
    plot_fit(result, folder / "fit.png")
    (folder / "fit.md").write_text(
        render("pipeline", "fit.md.j2", result | {"headings": HEADINGS, "lines": lines_of(result)}), encoding="utf-8"
    )


def lines_of(result: Row) -> list[list[str]]:
    """The table's cells: what was measured, then what is predicted and unbeaten, fastest last; ≈ marks predictions."""
    rows = [row for row in result["candidates"] if row["measured"] is not None or row["pareto"]]
    ordered = sorted(rows, key=lambda row: (row["measured"] is None, -row["predicted"]["p95_ms"]))
    return [_cells(row, result) for row in ordered]


def _cells(row: Row, result: Row) -> list[str]:
    figures, mark = (row["predicted"], "≈ ") if row["measured"] is None else (row["measured"], "")
    drop = row["predicted_drop"] if row["measured"] is None else figures["drop"]
    memory = figures["memory_mb"]
    return [
        row["name"],
        f"{mark}{100 * drop:.2f}{' pt' if result['metric']['metric'] == 'accuracy' else '%'}",
        f"{mark}{figures['p50_ms']:.2f}",
        f"{mark}{figures['p95_ms']:.2f}",
        "" if memory is None else f"{mark}{memory:.0f}",
        f"{mark}{figures['size_mb']:.1f}",
        f"{row['predicted']['p50_ms']:.2f}",
        _remark(row, figures, drop, result["budget"]),
    ]


def _remark(row: Row, figures: Row, drop: float, budget: Row) -> str:
    if row["recommended"]:
        return "recommended"
    limits = {**{key: figures[key] for key in ("p95_ms", "memory_mb", "size_mb")}, "max_drop": drop}
    names = {"p95_ms": "p95", "memory_mb": "memory", "size_mb": "size", "max_drop": "drop"}
    over = [
        f"{names[key]} over by {value / budget[key] - 1:.0%}" if budget[key] else f"{names[key]} over"
        for key, value in limits.items()
        if budget[key] is not None and value is not None and value > budget[key]
    ]
    return ", ".join(over) or "fits"
