"""What a model may cost where it will run: limits on latency, memory, size and accuracy, and what breaks them.

Light on purpose: the command line reads limits before anything heavy is loaded.
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
    """What one model takes on one device: milliseconds of a request, and MB (10⁶ bytes).

    ``memory_mb`` is the peak of the process that runs it; None where the device does not tell.
    ``drop`` is what accuracy is lost, in the terms of `drop_of`; None where it is not measured yet.
    """

    p50_ms: float
    p95_ms: float
    memory_mb: float | None
    size_mb: float
    drop: float | None = None


@dataclass(frozen=True)
class Miss:
    """One limit that is not kept: its name, the limit, what was found, and how far that is over, as a share."""

    limit: str
    allowed: float
    found: float

    @property
    def over(self) -> float:
        """By what share the limit is broken; infinite for a limit of 0."""
        return self.found / self.allowed - 1 if self.allowed > 0 else math.inf


@dataclass(frozen=True)
class Budget:
    """Limits; None is no limit. ``max_drop`` is in the terms of `drop_of`."""

    p95_ms: float | None = None
    memory_mb: float | None = None
    size_mb: float | None = None
    max_drop: float | None = None

    @classmethod
    def parsed(
        cls, *, p95: str | None, memory: str | None, size: str | None, max_drop: str | None, metric: str
    ) -> "Budget":
        """From the command line's words.

        Raises:
            InputError: a limit that is no positive quantity of its kind, or no limit on what a device costs.
        """
        if p95 is None and memory is None and size is None:
            raise InputError("give at least one limit of --p95, --memory and --size: without one the dense model fits")
        if max_drop is not None and metric != "accuracy" and max_drop.strip().endswith("pt"):
            raise InputError(
                f"--max-drop {max_drop}: points are for accuracy; give a perplexity's rise in %, such as 2%"
            )
        return cls(
            p95_ms=None if p95 is None else quantity("--p95", p95, TIMES, "20ms"),
            memory_mb=None if memory is None else quantity("--memory", memory, SIZES, "128MB"),
            size_mb=None if size is None else quantity("--size", size, SIZES, "20MB"),
            max_drop=None if max_drop is None else quantity("--max-drop", max_drop, SHARES, "1%", zero=True),
        )

    def misses(self, figures: Figures) -> list[Miss]:
        """The limits that these figures break; what is not known breaks none."""
        pairs: Mapping[str, tuple[float | None, float | None]] = {
            "p95_ms": (self.p95_ms, figures.p95_ms),
            "memory_mb": (self.memory_mb, figures.memory_mb),
            "size_mb": (self.size_mb, figures.size_mb),
            "drop": (self.max_drop, figures.drop),
        }
        return [
            Miss(name, limit, found)
            for name, (limit, found) in pairs.items()
            if limit is not None and found is not None and not found <= limit
        ]

    def distance(self, figures: Figures) -> float:
        """How far off the worst broken limit is, as a share of it; 0 where all are kept."""
        return max((miss.over for miss in self.misses(figures)), default=0.0)


def drop_of(metric: str, dense: float, value: float) -> float:
    """What is lost against the dense model: points of accuracy (0.01 is one point), or a perplexity's relative rise.

    >>> round(drop_of("accuracy", 0.90, 0.88), 6), round(drop_of("perplexity", 20.0, 21.0), 6)
    (0.02, 0.05)
    """
    return dense - value if metric == "accuracy" else value / dense - 1


def quantity(option: str, text: str, units: Mapping[str, float], example: str, *, zero: bool = False) -> float:
    """A number with one of the units, in the units' common measure.

    >>> quantity("--p95", "1.5 s", TIMES, "20ms")
    1500.0

    Raises:
        InputError: no number, no unit or an unknown one, or not above 0.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z%]+)\s*", text)
    factor = None if match is None else units.get(match[2].lower())
    if match is None or factor is None:
        raise InputError(f"{option} {text!r}: give a number with a unit ({', '.join(units)}), such as {example}")
    value = float(match[1]) * factor
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise InputError(f"{option} {text!r} is no limit that a model could keep; give more than 0, such as {example}")
    return value
