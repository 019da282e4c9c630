"""Regularises training with rank surrogates of all weights that truncation would cut.

The regulariser decides which surrogate is evaluated in which step, with which weight and in which metric. Of processes
that work together, each evaluates a share of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.errors import InputError
from converters.lowrank import add_weight_gradient, dense_weight
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.decompositions import Losses, decompose_layers, sharing_candidates
from prehab_export.compression.metric import Metric, layer_metric
from prehab_export.compression.moments import Statistics
from prehab_export.compression.planning import ranks_by
from prehab_export.config import PrehabConfig, TruncateConfig
from prehab_export.linalg import (
    Frame,
    Nuclear,
    Spectral,
    StochasticStableRank,
    Surrogate,
    Tail,
    Whitened,
    objective_value,
    spectral,
    stable_rank,
    tails,
)
from prehab_export.system import team

# Least layer weight, as a share of the layer's Fisher energy, if the predicted loss is lower.
LEAST_LOSS = 1e-9

# The layers that have one surrogate: a single layer, or a stack of layers with one input that would share a ``down``.
Unit = tuple[str, ...]


@dataclass
class Term:
    """The part of one unit in the regulariser.

    surrogate: uses the latest moments and aims at the latest rank.
    weight: weight relative to other units.
    start: value of the surrogate when the unit first had one. Weight and start never change, so that λ keeps its
        meaning throughout the run.
    latest: the latest value of the surrogate.
    gradient: the latest gradient (m×n), used in all steps until the next evaluation; None before the first.
    """

    surrogate: Surrogate
    weight: float
    start: float
    latest: float
    gradient: Tensor | None = None


class Regulariser:
    """Holds the surrogates of all units that truncation would cut, and evaluates them in turns.

    ranks: the rank that truncation would choose for each unit; units that it would leave dense are not in it.
    terms: the terms of these units, except units that are 0 in the metric.
    """

    def __init__(
        self, calibrated: Calibrated, config: PrehabConfig, truncation: TruncateConfig, *, seed: int = 0
    ) -> None:
        self.calibrated, self.config, self.truncation = calibrated, config, truncation
        self.ranks: dict[Unit, int] = {}
        self.terms: dict[Unit, Term] = {}
        # All units that ever had a term: if truncation leaves one dense for a while, it keeps its weight and start.
        self._known: dict[Unit, Term] = {}
        self._mean_size = 0.0
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def value(self) -> float:
        """Weighted mean of the latest values of the surrogates, each relative to its start."""
        weight = sum(term.weight for term in self.terms.values())
        total = sum(term.weight * term.latest / term.start for term in self.terms.values())
        return total / weight if weight else 0.0

    @torch.no_grad()
    def refresh(self, statistics: Statistics) -> None:
        """Whiten with these moments, and aim at the ranks that truncation would choose with them.

        Raises:
            InputError: gradient moments are needed but the statistics hold none.
        """
        whitening, weights = self.config.whitening, self.config.layer_weights
        if (whitening == "fisher" or weights != "equal") and not statistics.gradients:
            raise InputError(
                f"prehab with whitening {whitening!r} and layer weights {weights!r} needs gradient moments; calibrate "
                "with gradients, or use --set prehab.whitening=activation --set prehab.layer_weights=equal"
            )
        metrics = _Whitening(self.calibrated.with_statistics(statistics), self.truncation.gradient_shrinkage)
        predicted = self._losses(metrics)
        plan = ranks_by(self.calibrated.shapes, predicted, self.truncation, self.calibrated.cost)
        grouped = {name for group in plan.shared for name in group}
        units = [*plan.shared, *((name,) for name in self.calibrated.layers if name not in grouped)]
        self.ranks = {unit: rank for unit in units if (rank := plan.ranks[unit[0]]) is not None}
        whitened = {unit: metrics.unit(unit, whitening) for unit in self.ranks}
        # A unit that is 0 in the metric loses nothing in truncation, and its surrogate could not be normalised.
        surrogates = {
            unit: self._surrogate(whitened[unit], rank)
            for unit, rank in self.ranks.items()
            if whitened[unit].energy > 0
        }
        sizes = {unit: self._size(unit, metrics, predicted) for unit in surrogates if unit not in self._known}
        if sizes and not self._mean_size:
            self._mean_size = sum(sizes.values()) / len(sizes)
        for unit, term in self.terms.items():
            if unit not in surrogates:
                term.gradient = None
        for unit, surrogate in surrogates.items():
            if unit in sizes:
                value = float(surrogate.evaluate(self._stacked(unit))[0])
                start = max(value, torch.finfo(torch.float32).tiny)
                self._known[unit] = Term(surrogate, sizes[unit] / self._mean_size, start, value)
            else:
                self._known[unit].surrogate = surrogate
        self.terms = {unit: self._known[unit] for unit in surrogates}

    @torch.no_grad()
    def add_gradients(self, step: int, strength: float) -> None:
        """Add ``λ ∂(weighted mean of normalised surrogates)/∂W`` to every layer's ``.grad``.

        The units whose turn it is are evaluated; the others use the gradient of their last turn.
        """
        due = self._due(step)
        for unit, gradient in zip(
            due, self._evaluated(due, lambda term, weight: term.surrogate.evaluate(weight)), strict=True
        ):
            term = self.terms[unit]
            term.gradient = (term.weight / term.start / len(self.terms) * gradient).contiguous()
        for unit, term in self.terms.items():
            if term.gradient is not None:
                for name, part in self._parts(unit, strength * term.gradient):
                    add_weight_gradient(self.calibrated.layer(name), part)

    @torch.no_grad()
    def shrink(self, step: int, rate: float) -> None:
        """Take the proximal step of the units whose turn it is; it covers all steps until their next turn.

        Call it between the backward pass and the optimiser step, as decoupled weight decay in AdamW does.

        Args:
            rate: λ times the learning rate.
        """

        def shrink(term: Term, weight: Tensor) -> tuple[Tensor, Tensor]:
            assert isinstance(term.surrogate, Tail | Nuclear)  # the configuration allows only these
            return term.surrogate.shrink(weight, rate * self.config.every * term.weight)

        due = self._due(step)
        for unit, shrunk in zip(due, self._evaluated(due, shrink), strict=True):
            for name, part in self._parts(unit, shrunk):
                dense_weight(self.calibrated.layer(name)).copy_(part)

    def _evaluated(self, units: list[Unit], evaluate: Callable[[Term, Tensor], tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Evaluate the surrogates of these units, each in one process, and return a matrix for each of them (m×n).

        Args:
            evaluate: (term, stacked weight) → the value of its surrogate, and the matrix.
        """
        # Random surrogates are cheap, and draw the same numbers in every process if each of them evaluates all.
        random = self.config.surrogate == "stochastic-stable-rank"
        mine = set(range(len(units)) if random else team().share_of(len(units)))
        values, matrices = [0.0] * len(units), []
        for number, unit in enumerate(units):
            weight = self._stacked(unit)
            matrix = torch.empty_like(weight)
            if number in mine:
                value, result = evaluate(self.terms[unit], weight)
                values[number], matrix = float(value), result.to(weight.dtype).contiguous()
            matrices.append(matrix)
        if not random:
            team().exchange(matrices)
            values = team().totals(values)
        for unit, latest in zip(units, values, strict=True):
            self.terms[unit].latest = latest
        return matrices

    def _due(self, step: int) -> list[Unit]:
        units = list(self.terms)
        turn = set(units[step % self.config.every :: self.config.every])
        if self.config.update == "gradient":
            turn |= {unit for unit, term in self.terms.items() if term.gradient is None}
        return [unit for unit in units if unit in turn]

    def _stacked(self, unit: Unit) -> Tensor:
        return _stacked(self.calibrated, unit)

    def _parts(self, unit: Unit, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Split a stacked matrix into the parts of the layers."""
        sizes = [dense_weight(self.calibrated.layer(name)).shape[0] for name in unit]
        return zip(unit, stacked.split(sizes), strict=True)

    def _losses(self, metrics: "_Whitening") -> Losses:
        """Return predicted losses under truncation's objective, or none if neither ranks nor weights depend on them."""
        weighs = self.config.layer_weights == "loss" and not self._known
        if not weighs and self.truncation.allocation != "loss":
            return {}, {}
        calibrated = metrics.calibrated
        if self.truncation.base_objective != "fisher":
            # The factors are optimal in another metric than that of the losses, so they must be computed first.
            return decompose_layers(calibrated, self.truncation).losses
        objectives = dict.fromkeys(calibrated.layers, "fisher")
        groups = sharing_candidates(calibrated, objectives) if self.truncation.share_inputs else []
        single = {name: metrics.losses((name,)) for name in calibrated.layers}
        return single, {group: metrics.losses(group) for group in groups}

    def _surrogate(self, whitened: Whitened, rank: int) -> Surrogate:
        surrogate = self.config.surrogate
        if surrogate == "tail":
            return Tail(whitened, rank)
        if surrogate == "nuclear":
            return Nuclear(whitened)
        if surrogate == "stochastic-stable-rank":
            return StochasticStableRank(whitened.frame, self._generator)
        return Spectral(whitened, {"stable-rank": stable_rank, "spectral": spectral}[surrogate])

    def _size(self, unit: Unit, metrics: "_Whitening", predicted: Losses) -> float:
        """Return the value that a unit's weight is proportional to.

        Predicted losses are ½ tr(G Δ C Δᵀ), with Δ = W at rank 0.
        """
        if self.config.layer_weights == "equal":
            return 1.0
        if self.config.layer_weights == "loss":
            losses = predicted[1][unit] if len(unit) > 1 else predicted[0][unit[0]]
            return max(float(losses[self.ranks[unit]]), LEAST_LOSS * float(losses[0]))
        return sum(
            0.5
            * objective_value(dense_weight(self.calibrated.layer(name)), metric.second_moment, metric.gradient_moment)
            for name, metric in zip(unit, metrics.of(unit), strict=True)
        )


class _Whitening:
    """Whitens the units of a model in the metrics of its moments, each unit once."""

    def __init__(self, calibrated: Calibrated, gradient_shrinkage: float) -> None:
        self.calibrated, self.gradient_shrinkage = calibrated, gradient_shrinkage
        self._units: dict[tuple[Unit, str], Whitened] = {}

    def of(self, unit: Unit) -> list[Metric]:
        """Return the metric of every layer in the unit."""
        layer, statistics = self.calibrated.layer, self.calibrated.statistics
        return [layer_metric(name, layer(name), statistics, self.gradient_shrinkage) for name in unit]

    def unit(self, unit: Unit, whitening: str) -> Whitened:
        """Return the whitened weight of a unit."""
        if (unit, whitening) not in self._units:
            weight, metrics, gradients = _stacked(self.calibrated, unit), self.of(unit), None
            if whitening == "fisher":
                gradients = [metric.gradient_moment for metric in metrics if metric.gradient_moment is not None]
            frame = Frame.of(weight, metrics[0].second_moment, gradients)
            self._units[unit, whitening] = Whitened(frame, weight)
        return self._units[unit, whitening]

    def losses(self, unit: Unit) -> Tensor:
        """Return the predicted loss of a unit's best factors at every rank."""
        return 0.5 * tails(self.unit(unit, "fisher").spectrum)


def _stacked(calibrated: Calibrated, unit: Unit) -> Tensor:
    weights = [dense_weight(calibrated.layer(name)).detach().float() for name in unit]
    return weights[0] if len(weights) == 1 else torch.cat(weights)
