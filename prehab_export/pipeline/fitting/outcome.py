"""What came of a fit, and what to make of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from prehab_export.config import Budget, Figures
from prehab_export.inputs import Metrics
from prehab_export.pipeline.fitting.finals import Finals
from prehab_export.pipeline.fitting.search import Candidate, Line, chosen, pareto


@dataclass(frozen=True)
class Outcome:
    """Every candidate; the finalists among them, measured; the dense model's metrics."""

    budget: Budget
    candidates: Sequence[Candidate]
    finals: Finals
    dense: Metrics

    @cached_property
    def best(self) -> Candidate | None:
        """The one that is recommended; None where none keeps to the budget."""
        return chosen(self.finals.tried, self.budget)

    def verdict(self) -> str:
        """A sentence or two: what to take, or that nothing was found and what comes nearest."""
        if self.best is not None:
            return _praise(self.best, self._figures[self.best.key], self.dense)
        near, own = min(self.finals.tried, key=lambda pair: self.budget.distance(pair[1]))
        return _nearest(near, own, self.budget)

    def rows(self, drops: Line) -> list[dict[str, Any]]:
        """The candidates as JSON types, with what is predicted and what was measured.

        Args:
            drops: predicted loss → the metric's drop.
        """
        unbeaten_rows = pareto([(c.loss, c.predicted.p95_ms, c.predicted.size_mb) for c in self.candidates])
        return [
            candidate.facts()
            | {
                "predicted_drop": drops.at(candidate.loss),
                "pareto": unbeaten,
                "fits_by_prediction": not self.budget.misses(candidate.predicted),
                "measured": asdict(self._figures[candidate.key]) if candidate.key in self._figures else None,
                "recommended": self.best is not None and candidate.key == self.best.key,
            }
            for candidate, unbeaten in zip(self.candidates, unbeaten_rows, strict=True)
        ]

    @cached_property
    def _figures(self) -> dict[Any, Figures]:
        """A candidate's key → what was measured of it."""
        return {candidate.key: own for candidate, own in self.finals.tried}


def _praise(best: Candidate, own: Figures, dense: Metrics) -> str:
    assert own.drop is not None
    start = "The dense model is within the budget: nothing needs to be cut. " if best.is_dense else ""
    unit = "points of accuracy" if dense.metric == "accuracy" else "% of perplexity"
    memory = "" if own.memory_mb is None else f", {own.memory_mb:.0f} MB of memory"
    off = best.predicted.p50_ms / own.p50_ms - 1
    return (
        f"{start}Take {best.name}: {100 * own.drop:.2f} {unit} lost, p95 {own.p95_ms:.2f} ms, file {own.size_mb:.1f} MB"
        f"{memory}. Its p50 was predicted as {best.predicted.p50_ms:.2f} ms, {off:+.1%} off."
    )


def _nearest(near: Candidate, own: Figures, budget: Budget) -> str:
    over = "; ".join(f"{m.limit} {m.found:.4g} where {m.allowed:.4g} is allowed" for m in budget.misses(own))
    return f"No model was found within the budget. The nearest is {near.name}: {over}."
