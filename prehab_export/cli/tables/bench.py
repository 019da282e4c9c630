"""A bench's result as a table for the terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

Row = dict[str, Any]

# heading, key of a case, digits after the point
_ENCODER = (("p50 ms", "p50_ms", 2), ("p90 ms", "p90_ms", 2), ("items/s", "throughput_per_s", 1))
_DECODER = (
    ("first token ms", "time_to_first_token_ms", 2),
    ("next token ms", "inter_token_p50_ms", 2),
    ("tok/s", "tokens_per_s", 1),
)
_BOTH = (("peak MB", "peak_resident_mb", 0), ("file MB", "file_mb", 1))


def format_bench(result: Row) -> Table:
    """The cases in rows, each model's speedup over the baseline and its confidence interval beside them."""
    cases = result["cases"]
    tokens = any(row["sequence"] is not None for row in cases)
    decodes = any(row["time_to_first_token_ms"] is not None for row in cases)
    columns = (_DECODER if decodes else _ENCODER) + _BOTH
    counts = list(dict.fromkeys(str(row["threads"]) for row in cases))
    title = f"{result['machine']['cpu'] or 'CPU'}, {' or '.join(counts)} thread(s)"
    sizes = [*(["threads"] if len(counts) > 1 else []), "batch", *(["sequence"] if tokens else [])]
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("model", overflow="fold")
    for heading in (*(size.replace("sequence", "seq") for size in sizes), *(heading for heading, _, _ in columns)):
        table.add_column(heading, justify="right")
    table.add_column("speedup", no_wrap=True)
    for row in cases:
        figures = [_figure(row[key], digits) for _, key, digits in columns]
        own = (str(row[size]) for size in sizes)
        table.add_row(row["model"], *own, *figures, _speedup(row, result["comparison"]))
    return table


def _figure(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits if value < 1000 else 0}f}"


def _speedup(row: Row, comparison: list[Row]) -> str:
    for entry in comparison:
        if all(entry[key] == row[key] for key in ("model", "batch", "sequence", "threads")):
            low, high = entry["speedup_low"], entry["speedup_high"]
            interval = "" if low is None else f" ({low:.2f}–{high:.2f})"
            return f"{_figure(entry['speedup'], 2)}×{interval}"
    return ""
