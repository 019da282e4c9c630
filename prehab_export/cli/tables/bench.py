"""The table of a benchmark on the terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

Row = dict[str, Any]

# Columns: heading, key of a case, decimal places.
_ENCODER_COLUMNS = (("p50 ms", "p50_ms", 2), ("p90 ms", "p90_ms", 2), ("items/s", "throughput_per_s", 1))
_DECODER_COLUMNS = (
    ("first token ms", "time_to_first_token_ms", 2),
    ("next token ms", "inter_token_p50_ms", 2),
    ("tok/s", "tokens_per_s", 1),
)
_COMMON_COLUMNS = (("peak MB", "peak_resident_mb", 0), ("file MB", "file_mb", 1))


def format_bench(result: Row) -> Table:
    """Return a table with one row for each case. The last column is the speedup over the dense model, with its
    confidence interval, if there is a dense graph."""
    cases = result["cases"]
    has_sequences = any(row["sequence"] is not None for row in cases)
    is_decoder = any(row["time_to_first_token_ms"] is not None for row in cases)
    columns = (_DECODER_COLUMNS if is_decoder else _ENCODER_COLUMNS) + _COMMON_COLUMNS
    thread_counts = list(dict.fromkeys(str(row["threads"]) for row in cases))
    title = f"{result['machine']['cpu'] or 'CPU'}, {' or '.join(thread_counts)} thread(s)"
    sizes = [*(["threads"] if len(thread_counts) > 1 else []), "batch", *(["sequence"] if has_sequences else [])]
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("model", overflow="fold")
    for heading in (*(size.replace("sequence", "seq") for size in sizes), *(heading for heading, _, _ in columns)):
        table.add_column(heading, justify="right")
    if result["comparison"]:
        table.add_column("speedup", no_wrap=True)
    for row in cases:
        figures = [_format_figure(row[key], digits) for _, key, digits in columns]
        case_sizes = (str(row[size]) for size in sizes)
        speedup = [_format_speedup(row, result["comparison"])] if result["comparison"] else []
        table.add_row(row["model"], *case_sizes, *figures, *speedup)
    return table


def _format_figure(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits if value < 1000 else 0}f}"


def _format_speedup(row: Row, comparison: list[Row]) -> str:
    for entry in comparison:
        if all(entry[key] == row[key] for key in ("model", "batch", "sequence", "threads")):
            low, high = entry["speedup_low"], entry["speedup_high"]
            interval = "" if low is None else f" ({low:.2f}–{high:.2f})"
            return f"{_format_figure(entry['speedup'], 2)}×{interval}"
    return ""
