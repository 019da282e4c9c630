"""The report of a fit: ``fit.json``, ``fit.md`` and a plot, and the rows of its table."""

from pathlib import Path
from typing import Any

from prehab_export.pipeline.report.plots import plot_fit
from prehab_export.system import render, write_json

Row = dict[str, Any]

FIT_HEADINGS = ("", "drop", "p50 ms", "p95 ms", "memory MB", "file MB", "predicted p50 ms", "")


def write_fit(result: Row, folder: Path) -> None:
    """Write the full result as JSON, the table as Markdown, and the plot."""
    write_json(folder / "fit.json", result)
    plot_fit(result, folder / "fit.png")
    facts = result | {"headings": FIT_HEADINGS, "rows": fit_rows(result)}
    (folder / "fit.md").write_text(render("pipeline", "fit.md.j2", facts), encoding="utf-8")


def fit_rows(result: Row) -> list[list[str]]:
    """Return the cells of the table, one list for each row under `FIT_HEADINGS`.

    The measured candidates come first, then the Pareto-optimal predictions, each sorted from slow to fast. The sign ≈
    marks a prediction.
    """
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
    values = {**{key: figures[key] for key in ("p95_ms", "memory_mb", "size_mb")}, "max_drop": drop}
    labels = {"p95_ms": "p95", "memory_mb": "memory", "size_mb": "size", "max_drop": "drop"}
    excesses = [
        f"{labels[key]} over by {value / budget[key] - 1:.0%}" if budget[key] else f"{labels[key]} over"
        for key, value in values.items()
        if budget[key] is not None and value is not None and value > budget[key]
    ]
    return ", ".join(excesses) or "fits"
