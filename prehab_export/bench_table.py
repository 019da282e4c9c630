"""A bench's result as a table for the terminal."""

from typing import Any

from rich.table import Table

Row = dict[str, Any]

# columns of the table: heading, key of a case, digits
_COLUMNS = (
    ("p50 ms", "p50_ms", 2),
    ("p90 ms", "p90_ms", 2),
    ("items/s", "throughput_per_s", 1),
    ("first token ms", "time_to_first_token_ms", 2),
    ("next token ms", "inter_token_p50_ms", 2),
    ("tokens/s", "tokens_per_s", 1),
    ("load s", "load_s", 2),
    ("peak MB", "peak_resident_mb", 0),
    ("file MB", "file_mb", 1),
)


def format_bench(result: Row) -> Table:
    """The cases as a table for the terminal, with each model's speedup over the baseline beside it."""
    table = Table(title=f"{result['machine']['cpu']}, {result['config']['threads']} threads")
    tokens = any(row["sequence"] is not None for row in result["cases"])
    columns = [column for column in _COLUMNS if any(row[column[1]] is not None for row in result["cases"])]
    for heading in ("model", "batch", *(["sequence"] if tokens else [])):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for heading in ("speedup", *(heading for heading, _, _ in columns)):
        table.add_column(heading, justify="right")
    for row in result["cases"]:
        sizes = [str(row["batch"]), *([str(row["sequence"])] if tokens else [])]
        figures = [_figure(row[key], digits) for _, key, digits in columns]
        table.add_row(row["model"], *sizes, _speedup(row, result["comparison"]), *figures)
    return table


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _speedup(row: Row, comparison: list[Row]) -> str:
    keys = ("model", "batch", "sequence", "threads")
    for entry in comparison:
        if all(entry[key] == row[key] for key in keys):
            interval = (
                "" if entry["speedup_low"] is None else (f" ({entry['speedup_low']:.2f}–{entry['speedup_high']:.2f})")
            )
            return f"{entry['speedup']:.2f}×{interval}"
    return ""
