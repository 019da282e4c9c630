"""Limits on a model's latency, memory, size and loss of accuracy on the device where it will run.

This module imports quickly, because the command line parses limits before it loads large libraries.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from converters.errors import InputError

# Factor of each unit, in milliseconds and in MB (10⁶ bytes).
TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}
SIZES = {"kb": 1e-3, "mb": 1.0, "gb": 1e3, "kib": 1024e-6, "mib": 1048576e-6, "gib": 1073741824e-6}
SHARES = {"%": 0.01, "pt": 0.01}


@dataclass(frozen=True)
class Figures:
    """Measurements of one model on one device: milliseconds per request, and MB (10⁶ bytes).

    ``memory_mb`` is the peak memory of the process that runs the model; None if the device does not report it.
    ``drop`` is the loss against the dense model, as `drop_of` defines it; None if it is not measured yet.
    """

    p50_ms: float
    p95_ms: float
    memory_mb: float | None
    size_mb: float
    drop: float | None = None


@dataclass(frozen=True)
class Miss:
    """A limit that is exceeded: its name, its value, and the measured value."""

    limit: str
    allowed: float
    found: float

    @property
    def over(self) -> float:
        """The excess over the limit, as a share of the limit; infinite for a limit of 0."""
        return self.found / self.allowed - 1 if self.allowed > 0 else math.inf


@dataclass(frozen=True)
class Budget:
    """Limits on the `Figures` of a model; None means no limit. ``max_drop`` is a loss as `drop_of` defines it."""

    p95_ms: float | None = None
    memory_mb: float | None = None
    size_mb: float | None = None
    max_drop: float | None = None

    @classmethod
    def parse(
        cls, *, p95: str | None, memory: str | None, size: str | None, max_drop: str | None, metric: str
    ) -> "Budget":
        """Parse the limits that the command line gives, such as ``20ms``, ``128MB`` and ``1%``.

        Args:
            metric: ``accuracy`` or ``perplexity``; only accuracy can drop by points.

        Raises:
            InputError: a limit is not a positive quantity with a known unit, or p95, memory and size are all missing.
        """
        if p95 is None and memory is None and size is None:
            raise InputError("give at least one limit of --p95, --memory and --size: without one the dense model fits")
        if max_drop is not None and metric != "accuracy" and max_drop.strip().endswith("pt"):
            raise InputError(
                f"--max-drop {max_drop}: points are for accuracy; give the rise of the perplexity in %, such as 2%"
            )
        return cls(
            p95_ms=None if p95 is None else quantity("--p95", p95, TIMES, "20ms"),
            memory_mb=None if memory is None else quantity("--memory", memory, SIZES, "128MB"),
            size_mb=None if size is None else quantity("--size", size, SIZES, "20MB"),
            max_drop=None if max_drop is None else quantity("--max-drop", max_drop, SHARES, "1%", zero=True),
        )

    def misses(self, figures: Figures) -> list[Miss]:
        """Return the limits that these figures exceed. An unknown figure exceeds no limit."""
        pairs: Mapping[str, tuple[float | None, float | None]] = {
            "p95_ms": (self.p95_ms, figures.p95_ms),
            "memory_mb": (self.memory_mb, figures.memory_mb),
            "size_mb": (self.size_mb, figures.size_mb),
            "drop": (self.max_drop, figures.drop),
        }
        return [
            Miss(name, limit, value)
            for name, (limit, value) in pairs.items()
            if limit is not None and value is not None and not value <= limit
        ]

    def distance(self, figures: Figures) -> float:
        """Return the largest excess over a limit, as a share of that limit; 0 if no limit is exceeded."""
        return max((miss.over for miss in self.misses(figures)), default=0.0)


def drop_of(metric: str, dense: float, value: float) -> float:
    """Return the loss against the dense model: the drop in accuracy (0.01 is one point), or the relative rise in
    perplexity.

    >>> round(drop_of("accuracy", 0.90, 0.88), 6), round(drop_of("perplexity", 20.0, 21.0), 6)
    (0.02, 0.05)
    """
    return dense - value if metric == "accuracy" else value / dense - 1


def quantity(option: str, text: str, units: Mapping[str, float], example: str, *, zero: bool = False) -> float:
    """Parse a number with a unit and convert it to the common unit.

    >>> quantity("--p95", "1.5 s", TIMES, "20ms")
    1500.0

    Raises:
        InputError: the number or the unit is missing, the unit is unknown, or the quantity is not above 0.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z%]+)\s*", text)
    factor = None if match is None else units.get(match[2].lower())
    if match is None or factor is None:
        raise InputError(f"{option} {text!r}: give a number with a unit ({', '.join(units)}), such as {example}")
    value = float(match[1]) * factor
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise InputError(f"{option} {text!r} is not a usable limit; give more than 0, such as {example}")
    return value
