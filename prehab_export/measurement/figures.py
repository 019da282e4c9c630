"""The figures of a bench's result, computed from the times and memory that its workers measure."""

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
MIN_ROUNDS = 5  # resampling fewer rounds gives intervals that are far too narrow


@dataclass(frozen=True)
class Timings:
    """The times of one model in milliseconds, with one array per round."""

    total: list[np.ndarray]
    first_token: list[np.ndarray]
    step: list[np.ndarray]

    @classmethod
    def from_answers(cls, answers: list[Row]) -> "Timings":
        """Build the timings from a worker's answers, one per round."""
        total, first_token, step = (
            [np.asarray(answer[key]) for answer in answers] for key in ("total_ms", "first_token_ms", "step_ms")
        )
        return cls(total, first_token, step)


def case_row(name: str, case: Row, load_figures: Row, timings: Timings, graph: GraphFacts) -> Row:
    """Return the figures of one model in one case.

    Args:
        load_figures: figures to add, of loading and of memory.
    """
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
    return {key: _finite(value) for key, value in (row | load_figures).items()}


def compare_rows(rows: list[Row], timings: Mapping[str, Timings]) -> list[Row]:
    """Compare each model with the first, in one case."""
    baseline = rows[0]
    return [_compare(baseline, row, timings[baseline["model"]], timings[row["model"]]) for row in rows[1:]]


def _compare(base: Row, row: Row, base_timings: Timings, timings: Timings) -> Row:
    low, high = ratio_interval(base_timings.total, timings.total)
    comparison = {
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
    return {key: _finite(value) for key, value in comparison.items()}


def ratio_interval(baseline: list[np.ndarray], model: list[np.ndarray]) -> Interval:
    """Return the interval of median(baseline) / median(model).

    A resample takes the same rounds of both models, because they share the load on the machine.
    """

    def ratio(indices: np.ndarray) -> float:
        return np.median(_pool(baseline, indices)) / np.median(_pool(model, indices))

    return _interval(len(baseline), ratio)


def percentile_interval(rounds: list[np.ndarray], percent: float) -> Interval:
    """Return the interval of a percentile of all runs."""
    return _interval(len(rounds), lambda indices: float(np.percentile(_pool(rounds, indices), percent)))


def _interval(rounds: int, statistic: Callable[[np.ndarray], float]) -> Interval:
    """Return the bootstrap interval of a statistic at the level `CONFIDENCE`; it resamples rounds, not single runs.

    Args:
        rounds: number of rounds; the interval is None if there are fewer than `MIN_ROUNDS`.
        statistic: computes the statistic from the indices of the resampled rounds.
    """
    if rounds < MIN_ROUNDS:
        return None, None
    result = bootstrap(
        (np.arange(rounds),),
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=False,
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _pool(rounds: list[np.ndarray], indices: np.ndarray) -> np.ndarray:
    return np.concatenate([rounds[index] for index in indices])


def _model_memory(row: Row) -> float | None:
    """Return the peak memory without that of Python and ONNX Runtime before a model is loaded."""
    if row["peak_resident_mb"] is None or row["runtime_resident_mb"] is None:
        return None
    return row["peak_resident_mb"] - row["runtime_resident_mb"]


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator is not None and denominator > 0 else None


def _percentile(values: np.ndarray, percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values.size else None


def _finite(value: Any) -> Any:
    """Convert NumPy scalars to Python's, and floats that are not finite to None, because JSON has no NaN."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
