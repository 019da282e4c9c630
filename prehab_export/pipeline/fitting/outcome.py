"""The outcome of a fit and its verdict."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from prehab_export.config import Budget, Figures
from prehab_export.inputs import Metrics
from prehab_export.pipeline.fitting.finals import Finals
from prehab_export.pipeline.fitting.search import Candidate, Line, pareto_mask, select_best


@dataclass(frozen=True)
class Outcome:
    """The outcome of a fit.

    candidates: all candidates.
    finals: the measurements of the finalists among them.
    dense: the metrics of the dense model.
    """

    budget: Budget
    candidates: Sequence[Candidate]
    finals: Finals
    dense: Metrics

    @cached_property
    def best(self) -> Candidate | None:
        """The recommended candidate, or None if no measured candidate is within the budget."""
        return select_best(self.finals.measurements, self.budget)

    def verdict(self) -> str:
        """Return the recommendation in a sentence or two, or name the nearest candidate if none is within the
        budget."""
        if self.best is not None:
            return _describe_best(self.best, self._figures[self.best.key], self.dense)
        nearest, measured = min(self.finals.measurements, key=lambda pair: self.budget.distance(pair[1]))
        return _describe_nearest(nearest, measured, self.budget)

    def rows(self, drops: Line) -> list[dict[str, Any]]:
        """Return the candidates as JSON types, with their predicted and measured figures.

        Args:
            drops: maps a predicted loss, in nats, to the drop of the metric.
        """
        mask = pareto_mask([(c.loss, c.predicted.p95_ms, c.predicted.size_mb) for c in self.candidates])
        return [
            candidate.facts()
            | {
                "predicted_drop": drops.at(candidate.loss),
                "pareto": is_optimal,
                "fits_by_prediction": not self.budget.misses(candidate.predicted),
                "measured": asdict(self._figures[candidate.key]) if candidate.key in self._figures else None,
                "recommended": self.best is not None and candidate.key == self.best.key,
            }
            for candidate, is_optimal in zip(self.candidates, mask, strict=True)
        ]

    @cached_property
    def _figures(self) -> dict[Any, Figures]:
        """The measured figures of the finalists, by the key of the candidate."""
        return {candidate.key: measured for candidate, measured in self.finals.measurements}


def _describe_best(best: Candidate, measured: Figures, dense: Metrics) -> str:
    assert measured.drop is not None
    start = "The dense model is within the budget: nothing needs to be cut. " if best.is_dense else ""
    unit = "points of accuracy" if dense.metric == "accuracy" else "% of perplexity"
    memory = "" if measured.memory_mb is None else f", {measured.memory_mb:.0f} MB of memory"
    error = best.predicted.p50_ms / measured.p50_ms - 1
    return (
        f"{start}Take {best.name}: {100 * measured.drop:.2f} {unit} lost, p95 {measured.p95_ms:.2f} ms, "
        f"file {measured.size_mb:.1f} MB{memory}. "
        f"The predicted p50 was {best.predicted.p50_ms:.2f} ms, {error:+.1%} off."
    )


def _describe_nearest(nearest: Candidate, measured: Figures, budget: Budget) -> str:
    excesses = "; ".join(
        f"{miss.limit} is {miss.found:.4g}, {miss.allowed:.4g} is allowed" for miss in budget.misses(measured)
    )
    return f"No model was found within the budget. The nearest is {nearest.name}: {excesses}."
