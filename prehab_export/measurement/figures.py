"""The figures that stand in a bench's result, from the times and memory that its workers answered."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from converters.onnx.graph_facts import GraphFacts

Row = dict[str, Any]
Interval = tuple[float | None, float | None]

PERCENTILES = (50, 90, 99)
CONFIDENCE = 0.95
RESAMPLES = 1000
LEAST_ROUNDS = 5  # with fewer there is nothing to draw from, and the interval would look far too narrow


@dataclass(frozen=True)
class Timings:
    """What one model's turns came to, in milliseconds: one array per round."""

    total: list[np.ndarray]
    first_token: list[np.ndarray]
    step: list[np.ndarray]

    @classmethod
    def of(cls, turns: list[Row]) -> "Timings":
        """From a worker's answers, one for each round."""
        total, first, step = (
            [np.asarray(turn[key]) for turn in turns] for key in ("total_ms", "first_token_ms", "step_ms")
        )
        return cls(total, first, step)


def case_row(name: str, case: Row, taken: Row, timings: Timings, graph: GraphFacts) -> Row:
    total, step = np.concatenate(timings.total), np.concatenate(timings.step)
    batch = case["batch"]
    row = {
        "model": name,
        "threads": case["threads"],
        "batch": batch,
        "sequence": case["sequence"],
        "runs": total.size,
        **{f"p{percent}_ms": _percentile(total, percent) for percent in PERCENTILES},
        **{
            f"p{percent}_{end}_ms": value
            for percent in PERCENTILES
            for end, value in zip(("low", "high"), percentile_interval(timings.total, percent), strict=True)
        },
        "mean_ms": total.mean(),
        "throughput_per_s": batch * 1e3 / total.mean(),
        "file_mb": graph.file_bytes / 1e6,
        "time_to_first_token_ms": _percentile(np.concatenate(timings.first_token), 50) if graph.decodes else None,
        "inter_token_p50_ms": _percentile(step, 50),
        "inter_token_p90_ms": _percentile(step, 90),
        "tokens_per_s": batch * 1e3 / step.mean() if step.size else None,
        "round_p50_ms": [_finite(np.median(values)) for values in timings.total],
    }
    return {key: _finite(value) for key, value in (row | taken).items()}


def compare_rows(rows: list[Row], timings: Mapping[str, Timings]) -> list[Row]:
    """Each further model against the first, in one case."""
    baseline = rows[0]
    return [_compare(baseline, row, timings[baseline["model"]], timings[row["model"]]) for row in rows[1:]]


def _compare(base: Row, row: Row, base_timings: Timings, timings: Timings) -> Row:
    low, high = ratio_interval(base_timings.total, timings.total)
    compared = {
        "model": row["model"],
        "baseline": base["model"],
        "threads": row["threads"],
        "batch": row["batch"],
        "sequence": row["sequence"],
        "speedup": _ratio(base["p50_ms"], row["p50_ms"]),
        "speedup_low": low,
        "speedup_high": high,
        "confidence": CONFIDENCE,
        "first_token_speedup": _ratio(base["time_to_first_token_ms"], row["time_to_first_token_ms"]),
        "inter_token_speedup": _ratio(base["inter_token_p50_ms"], row["inter_token_p50_ms"]),
        "memory_ratio": _ratio(row["peak_resident_mb"], base["peak_resident_mb"]),
        "model_memory_ratio": _ratio(_model_memory(row), _model_memory(base)),
        "size_ratio": _ratio(row["file_mb"], base["file_mb"]),
    }
    return {key: _finite(value) for key, value in compared.items()}


def ratio_interval(baseline: list[np.ndarray], model: list[np.ndarray]) -> Interval:
    """Of median(baseline) / median(model); both models' turns of a round are drawn together."""

    def ratio(drawn: np.ndarray) -> float:
        return np.median(_pooled(baseline, drawn)) / np.median(_pooled(model, drawn))

    return _interval(len(baseline), ratio)


def percentile_interval(rounds: list[np.ndarray], percent: float) -> Interval:
    """Of a percentile of all runs."""
    return _interval(len(rounds), lambda drawn: float(np.percentile(_pooled(rounds, drawn), percent)))


def _interval(rounds: int, statistic: Callable[[np.ndarray], float]) -> Interval:
    """A bootstrap interval (`CONFIDENCE`), whole rounds drawn with replacement; None with fewer than `LEAST_ROUNDS`.

    Args:
        statistic: of the rounds with these numbers.
    """
    if rounds < LEAST_ROUNDS:
        return None, None
    found = bootstrap(
        (np.arange(rounds),),
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=False,
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _pooled(rounds: list[np.ndarray], drawn: np.ndarray) -> np.ndarray:
    return np.concatenate([rounds[number] for number in drawn])


def _model_memory(row: Row) -> float | None:
    """Peak memory above that of the empty runtime."""
    if row["peak_resident_mb"] is None or row["runtime_resident_mb"] is None:
        return None
    return row["peak_resident_mb"] - row["runtime_resident_mb"]


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under is not None and under > 0 else None


def _percentile(values: np.ndarray, percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values.size else None


def _finite(value: Any) -> Any:
    """JSON has no NaN: a float that is not finite becomes None, NumPy scalars become Python's."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
