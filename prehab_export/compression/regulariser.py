"""The surrogates of everything that truncation would cut: which are evaluated when, at what weight, in which metric."""

from collections.abc import Iterator
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

# A layer with less than this share of its Fisher energy to lose counts as having this much.
LEAST_LOSS = 1e-9

# What has one surrogate: a layer, or layers with one input that truncation would give one ``down``, stacked.
Unit = tuple[str, ...]


@dataclass
class Term:
    """One unit's part in the regulariser.

    surrogate: under the latest moments, aiming at the latest rank.
    weight: relative to the other units'; start: the surrogate's value when the unit was first seen. Both stay, so that
        λ keeps its meaning through the run.
    latest: the surrogate's value when it was last evaluated.
    held: the gradient of that time (m×n), for the steps up to the next; None before the first.
    """

    surrogate: Surrogate
    weight: float
    start: float
    latest: float
    held: Tensor | None = None


class Regulariser:
    """The surrogates of everything that truncation would cut, and when each is evaluated.

    ranks: the rank that truncation would choose for each unit; what it would leave dense is not in it.
    terms: of these units, but for those that are 0 in the metric.
    """

    def __init__(
        self, calibrated: Calibrated, config: PrehabConfig, truncation: TruncateConfig, *, seed: int = 0
    ) -> None:
        self.calibrated, self.config, self.truncation = calibrated, config, truncation
        self.ranks: dict[Unit, int] = {}
        self.terms: dict[Unit, Term] = {}
        # Every unit that ever had a term: one that truncation leaves dense for a while keeps its weight and start.
        self._known: dict[Unit, Term] = {}
        self._mean_size = 0.0
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def value(self) -> float:
        """Weighted mean of the surrogates, each relative to its start, as last evaluated."""
        weight = sum(term.weight for term in self.terms.values())
        total = sum(term.weight * term.latest / term.start for term in self.terms.values())
        return total / weight if weight else 0.0

    @torch.no_grad()
    def refresh(self, statistics: Statistics) -> None:
        """Whiten with these moments, and aim at the ranks that truncation would choose with them.

        Raises:
            InputError: gradient moments are needed and the statistics hold none.
        """
        whitening, weights = self.config.whitening, self.config.layer_weights
        if (whitening == "fisher" or weights != "equal") and not statistics.gradients:
            raise InputError(
                f"prehab with whitening {whitening!r} and layer weights {weights!r} needs gradient moments; calibrate "
                "with gradients, or take --set prehab.whitening=activation --set prehab.layer_weights=equal"
            )
        metrics = _Whitening(self.calibrated.with_statistics(statistics), self.truncation.gradient_shrinkage)
        predicted = self._losses(metrics)
        plan = ranks_by(self.calibrated.shapes, predicted, self.truncation, self.calibrated.cost)
        grouped = {name for group in plan.shared for name in group}
        units = [*plan.shared, *((name,) for name in self.calibrated.layers if name not in grouped)]
        self.ranks = {unit: rank for unit in units if (rank := plan.ranks[unit[0]]) is not None}
        whitened = {unit: metrics.unit(unit, whitening) for unit in self.ranks}
        # What is 0 in the metric has nothing to prepare, nor a size to measure its surrogate by.
        found = {
            unit: self._surrogate(whitened[unit], rank)
            for unit, rank in self.ranks.items()
            if whitened[unit].energy > 0
        }
        sizes = {unit: self._size(unit, metrics, predicted) for unit in found if unit not in self._known}
        if sizes and not self._mean_size:
            self._mean_size = sum(sizes.values()) / len(sizes)
        for unit, term in self.terms.items():
            if unit not in found:
                term.held = None
        for unit, surrogate in found.items():
            if unit in sizes:
                value = float(surrogate.evaluate(self._stacked(unit))[0])
                start = max(value, torch.finfo(torch.float32).tiny)
                self._known[unit] = Term(surrogate, sizes[unit] / self._mean_size, start, value)
            else:
                self._known[unit].surrogate = surrogate
        self.terms = {unit: self._known[unit] for unit in found}

    @torch.no_grad()
    def add_gradients(self, step: int, strength: float) -> None:
        """Add ``λ ∂(weighted mean of normalised surrogates)/∂W`` to every layer's ``.grad``.

        The units whose turn it is are evaluated; the others get the gradient of their last turn.
        """
        for unit in self._due(step):
            term = self.terms[unit]
            value, gradient = term.surrogate.evaluate(self._stacked(unit))
            term.latest = float(value)
            term.held = (term.weight / term.start / len(self.terms) * gradient).contiguous()
        for unit, term in self.terms.items():
            if term.held is not None:
                for name, part in self._parts(unit, strength * term.held):
                    add_weight_gradient(self.calibrated.layers[name], part)

    @torch.no_grad()
    def shrink(self, step: int, rate: float) -> None:
        """Take the proximal step of the units whose turn it is, for all the steps up to their next turn.

        Called between backward and the optimiser step: the order of decoupled weight decay in AdamW.

        Args:
            rate: λ times the learning rate.
        """
        for unit in self._due(step):
            term = self.terms[unit]
            assert isinstance(term.surrogate, Tail | Nuclear)  # the configuration allows no other
            value, shrunk = term.surrogate.shrink(self._stacked(unit), rate * self.config.every * term.weight)
            term.latest = float(value)
            for name, part in self._parts(unit, shrunk):
                dense_weight(self.calibrated.layers[name]).copy_(part)

    def _due(self, step: int) -> list[Unit]:
        units = list(self.terms)
        turn = set(units[step % self.config.every :: self.config.every])
        if self.config.update == "gradient":
            turn |= {unit for unit, term in self.terms.items() if term.held is None}
        return [unit for unit in units if unit in turn]

    def _stacked(self, unit: Unit) -> Tensor:
        return _stacked(self.calibrated, unit)

    def _parts(self, unit: Unit, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What of a stacked matrix belongs to which layer."""
        layers = self.calibrated.layers
        return zip(unit, stacked.split([dense_weight(layers[name]).shape[0] for name in unit]), strict=True)

    def _losses(self, metrics: "_Whitening") -> Losses:
        """Predicted losses under truncation's objective, where ranks or weights go by them."""
        weighs = self.config.layer_weights == "loss" and not self._known
        if not weighs and self.truncation.allocation != "loss":
            return {}, {}
        calibrated = metrics.calibrated
        if self.truncation.base_objective != "fisher":
            # The factors are the best in another metric than the losses, so it takes the factors.
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
        """What the weight of a unit is in proportion to; predicted losses are ½ tr(G Δ C Δᵀ), at rank 0 with Δ = W."""
        if self.config.layer_weights == "equal":
            return 1.0
        if self.config.layer_weights == "loss":
            losses = predicted[1][unit] if len(unit) > 1 else predicted[0][unit[0]]
            return max(float(losses[self.ranks[unit]]), LEAST_LOSS * float(losses[0]))
        layers = self.calibrated.layers
        return sum(
            0.5 * objective_value(dense_weight(layers[name]), metric.second_moment, metric.gradient_moment)
            for name, metric in zip(unit, metrics.of(unit), strict=True)
        )


class _Whitening:
    """Units of a model in the metrics of its moments; each is whitened once."""

    def __init__(self, calibrated: Calibrated, gradient_shrinkage: float) -> None:
        self.calibrated, self.gradient_shrinkage = calibrated, gradient_shrinkage
        self._units: dict[tuple[Unit, str], Whitened] = {}

    def of(self, unit: Unit) -> list[Metric]:
        layers, statistics = self.calibrated.layers, self.calibrated.statistics
        return [layer_metric(name, layers[name], statistics, self.gradient_shrinkage) for name in unit]

    def unit(self, unit: Unit, whitening: str) -> Whitened:
        if (unit, whitening) not in self._units:
            weight, metrics, gradients = _stacked(self.calibrated, unit), self.of(unit), None
            if whitening == "fisher":
                gradients = [metric.gradient_moment for metric in metrics if metric.gradient_moment is not None]
            frame = Frame.of(weight, metrics[0].second_moment, gradients)
            self._units[unit, whitening] = Whitened(frame, weight)
        return self._units[unit, whitening]

    def losses(self, unit: Unit) -> Tensor:
        """Predicted loss at every rank of the best factors of a unit."""
        return 0.5 * tails(self.unit(unit, "fisher").spectrum)


def _stacked(calibrated: Calibrated, unit: Unit) -> Tensor:
    layers = calibrated.layers
    weights = [dense_weight(layers[name]).detach().float() for name in unit]
    return weights[0] if len(weights) == 1 else torch.cat(weights)
