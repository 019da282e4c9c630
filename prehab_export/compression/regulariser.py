"""The surrogates of everything that truncation would cut: which are evaluated when, at what weight, in which metric."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from converters.errors import InputError
from converters.lowrank import DenseLinear, add_weight_gradient, dense_weight
from prehab_export.compression.decompositions import Losses, decompose_layers, sharing_candidates
from prehab_export.compression.metric import Metric, layer_metric
from prehab_export.compression.moments import Statistics
from prehab_export.compression.planning import ranks_by
from prehab_export.config import PrehabConfig, TruncateConfig
from prehab_export.linalg import Cost, objective_value, parameters, surrogates, tails

# A layer with less than this share of its Fisher energy to lose counts as having this much.
LEAST_LOSS = 1e-9


# What has one surrogate: a layer, or layers with one input that truncation would give one ``down``, stacked.
Unit = tuple[str, ...]


class Regulariser:
    """The surrogates of everything that truncation would cut, and when each is evaluated.

    value: weighted mean of the surrogates, each relative to its start, as last evaluated.
    ranks: the rank that truncation would choose for each unit; what it would leave dense is not in it.
    """

    def __init__(
        self,
        layers: Mapping[str, DenseLinear],
        config: PrehabConfig,
        truncation: TruncateConfig,
        seed: int = 0,
        cost: Cost = parameters,
    ) -> None:
        self.layers = layers
        self.cost = cost
        self.config = config
        self.truncation = truncation
        self.ranks: dict[Unit, int] = {}
        self.terms: dict[Unit, surrogates.Surrogate] = {}
        # Set when a unit is first seen, so that λ keeps its meaning through the run.
        self._starts: dict[Unit, float] = {}
        self._weights: dict[Unit, float] = {}
        self._mean_size = 0.0
        self._latest: dict[Unit, float] = {}
        self._held: dict[Unit, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def value(self) -> float:
        weight = sum(self._weights[unit] for unit in self.terms)
        total = sum(self._weights[unit] * self._latest[unit] / self._starts[unit] for unit in self.terms)
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
        seen = _Whitening(self.layers, statistics, self.truncation.gradient_shrinkage)
        predicted = self._losses(seen)
        plan = ranks_by(self.layers, predicted, self.truncation, self.cost)
        units = [*plan.shared, *((name,) for name in self.layers if not any(name in group for group in plan.shared))]
        self.ranks = {unit: rank for unit in units if (rank := plan.ranks[unit[0]]) is not None}
        whitened = {unit: seen.unit(unit, whitening) for unit in self.ranks}
        # What is 0 in the metric has nothing to prepare, nor a size to measure its surrogate by.
        self.terms = {
            unit: self._term(whitened[unit], rank) for unit, rank in self.ranks.items() if whitened[unit].energy > 0
        }
        self._held = {unit: gradient for unit, gradient in self._held.items() if unit in self.terms}
        sizes = {unit: self._size(unit, seen, predicted) for unit in self.terms if unit not in self._weights}
        if sizes and not self._mean_size:
            self._mean_size = sum(sizes.values()) / len(sizes)
        self._weights |= {unit: size / self._mean_size for unit, size in sizes.items()}
        for unit in sizes:
            self._latest[unit] = float(self.terms[unit].evaluate(_stacked(self.layers, unit))[0])
            self._starts[unit] = max(self._latest[unit], torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def add_gradients(self, step: int, strength: float) -> None:
        """Add ``λ ∂(weighted mean of normalised surrogates)/∂W`` to every layer's ``.grad``.

        The units whose turn it is are evaluated; the others get the gradient of their last turn.
        """
        for unit in self._due(step):
            value, gradient = self.terms[unit].evaluate(_stacked(self.layers, unit))
            self._latest[unit] = float(value)
            share = self._weights[unit] / self._starts[unit] / len(self.terms)
            self._held[unit] = (share * gradient).contiguous()
        for unit, gradient in self._held.items():
            for name, part in self._parts(unit, strength * gradient):
                add_weight_gradient(self.layers[name], part)

    @torch.no_grad()
    def shrink(self, step: int, rate: float) -> None:
        """Take the proximal step of the units whose turn it is, for all the steps up to their next turn.

        Called between backward and the optimiser step: the order of decoupled weight decay in AdamW.

        Args:
            rate: λ times the learning rate.
        """
        for unit in self._due(step):
            term = self.terms[unit]
            assert isinstance(term, surrogates.Tail | surrogates.Nuclear)  # the configuration allows no other
            value, shrunk = term.shrink(_stacked(self.layers, unit), rate * self.config.every * self._weights[unit])
            self._latest[unit] = float(value)
            for name, part in self._parts(unit, shrunk):
                dense_weight(self.layers[name]).copy_(part)

    def _due(self, step: int) -> list[Unit]:
        units = list(self.terms)
        turn = set(units[step % self.config.every :: self.config.every])
        if self.config.update == "gradient":
            turn |= set(units) - set(self._held)
        return [unit for unit in units if unit in turn]

    def _parts(self, unit: Unit, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What of a stacked matrix belongs to which layer."""
        sizes = [dense_weight(self.layers[name]).shape[0] for name in unit]
        return zip(unit, stacked.split(sizes), strict=True)

    def _losses(self, seen: "_Whitening") -> Losses:
        """Predicted losses under truncation's objective, where ranks or weights go by them."""
        weighs = self.config.layer_weights == "loss" and not self._weights
        if not weighs and self.truncation.allocation != "loss":
            return {}, {}
        if self.truncation.base_objective != "fisher":
            # The factors are the best in another metric than the losses, so it takes the factors.
            return decompose_layers(self.layers, seen.statistics, self.truncation).losses
        objectives = dict.fromkeys(self.layers, "fisher")
        share = self.truncation.share_inputs
        groups = sharing_candidates(self.layers, seen.statistics, objectives) if share else []
        return {name: seen.losses((name,)) for name in self.layers}, {group: seen.losses(group) for group in groups}

    def _term(self, whitened: surrogates.Whitened, rank: int) -> surrogates.Surrogate:
        surrogate = self.config.surrogate
        if surrogate == "tail":
            return surrogates.Tail(whitened, rank)
        if surrogate == "nuclear":
            return surrogates.Nuclear(whitened)
        if surrogate == "stochastic-stable-rank":
            return surrogates.StochasticStableRank(whitened.frame, self._generator)
        functions = {"stable-rank": surrogates.stable_rank, "spectral": surrogates.spectral}
        return surrogates.Spectral(whitened, functions[surrogate])

    def _size(self, unit: Unit, seen: "_Whitening", predicted: Losses) -> float:
        """What the weight of a unit is in proportion to; predicted losses are ½ tr(G Δ C Δᵀ), at rank 0 with Δ = W."""
        if self.config.layer_weights == "equal":
            return 1.0
        if self.config.layer_weights == "loss":
            losses = predicted[1][unit] if len(unit) > 1 else predicted[0][unit[0]]
            return max(float(losses[self.ranks[unit]]), LEAST_LOSS * float(losses[0]))
        return sum(
            0.5 * objective_value(dense_weight(self.layers[name]), metric.second_moment, metric.gradient_moment)
            for name, metric in zip(unit, seen.metrics(unit), strict=True)
        )


class _Whitening:
    """Units of a model in the metrics of one set of moments; each is whitened once."""

    def __init__(self, layers: Mapping[str, DenseLinear], statistics: Statistics, gradient_shrinkage: float) -> None:
        self.layers, self.statistics, self.gradient_shrinkage = layers, statistics, gradient_shrinkage
        self._units: dict[tuple[Unit, str], surrogates.Whitened] = {}

    def metrics(self, unit: Unit) -> list[Metric]:
        least = self.gradient_shrinkage
        return [layer_metric(name, self.layers[name], self.statistics, least) for name in unit]

    def unit(self, unit: Unit, whitening: str) -> surrogates.Whitened:
        if (unit, whitening) not in self._units:
            weight, metrics, gradients = _stacked(self.layers, unit), self.metrics(unit), None
            if whitening == "fisher":
                gradients = [metric.gradient_moment for metric in metrics if metric.gradient_moment is not None]
            frame = surrogates.Frame.of(weight, metrics[0].second_moment, gradients)
            self._units[unit, whitening] = surrogates.Whitened(frame, weight)
        return self._units[unit, whitening]

    def losses(self, unit: Unit) -> Tensor:
        """Predicted loss at every rank of the best factors of a unit."""
        return 0.5 * tails(self.unit(unit, "fisher").spectrum)


def _stacked(layers: Mapping[str, DenseLinear], unit: Unit) -> Tensor:
    weights = [dense_weight(layers[name]).detach().float() for name in unit]
    return weights[0] if len(weights) == 1 else torch.cat(weights)
