"""Truncation of a model's targeted layers: decompose each once, share out ranks, cut, balance, measure.

One decomposition a layer serves every ratio and allocation, so it is kept (up to break-even rank, at the size of
the dense weight) and only sliced.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from converters.errors import InputError
from converters.lowrank import DenseLinear, Factors, LowRankLinear, balance, dense_weight
from prehab_export import allocation
from prehab_export.config import TruncateConfig
from prehab_export.decomposition import (
    Decomposition,
    damped,
    decompose,
    objective_value,
    predicted_loss,
)
from prehab_export.statistics import Statistics

# Directions that calibration never saw get this share of the mean energy: enough to order them by the weight
# itself when rank is left over, too little to be seen in the objective.
INPUT_DAMPING = 1e-8


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer. ``rank`` None: it stays dense. Losses in nats, per unit."""

    name: str
    out_features: int
    in_features: int
    rank: int | None
    objective: float
    predicted_loss: float | None
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class Truncation:
    factors: dict[str, Factors]
    layers: list[LayerResult]

    @property
    def ranks(self) -> dict[str, int]:
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    def summary(self) -> dict:
        before = sum(layer.parameters_before for layer in self.layers)
        after = sum(layer.parameters_after for layer in self.layers)
        losses = [layer.predicted_loss for layer in self.layers if layer.predicted_loss is not None]
        return {
            "targeted_parameters_before": before,
            "targeted_parameters_after": after,
            "targeted_share_removed": 1 - after / before,
            # One multiply-add a weight and token: for the targeted layers the two counts are the same.
            "targeted_multiply_adds_per_token_before": before,
            "targeted_multiply_adds_per_token_after": after,
            "predicted_loss_increase": sum(losses) if losses else None,
            "layers_factored": len(self.factors),
            "layers_dense": len(self.layers) - len(self.factors),
            "layers": [asdict(layer) for layer in self.layers],
        }


@dataclass(frozen=True)
class Metric:
    """The metric of one layer, float64: C (n×n, centred where a bias can take the mean), μ (n) and G (m×m)."""

    second_moment: Tensor
    gradient_moment: Tensor | None
    mean: Tensor | None


@dataclass(frozen=True)
class Decomposed:
    """One layer's decomposition, cut at break-even, with its predicted loss at ranks 0…min(m, n) if G is known."""

    decomposition: Decomposition
    losses: Tensor | None


def layer_metric(
    name: str,
    layer: DenseLinear | LowRankLinear,
    statistics: Statistics,
    gradient_damping: float,
    fold_mean: bool = True,
) -> Metric:
    """C, G and μ of a layer, damped. Where a bias can take the mean error, C is centred and μ given."""
    moment = statistics.input_of(name)
    folds = fold_mean and layer.bias is not None
    gradient = statistics.gradients.get(name)
    return Metric(
        damped(moment.centred() if folds else moment.second_moment, INPUT_DAMPING),
        None if gradient is None else damped(gradient, gradient_damping),
        moment.mean.double() if folds else None,
    )


def _metric(name: str, layer: DenseLinear, statistics: Statistics, config: TruncateConfig) -> Metric:
    # Plain SVD knows nothing of the inputs, their mean included.
    return layer_metric(name, layer, statistics, config.gradient_damping, fold_mean=config.objective != "weight")


def decompose_layers(
    layers: Mapping[str, DenseLinear],
    statistics: Statistics,
    config: TruncateConfig,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Decomposed]:
    """Decompose every layer under the configured objective.

    Raises:
        InputError: gradient moments are needed and the statistics hold none.
    """
    if config.needs_gradients and not statistics.gradients:
        raise InputError(
            f"objective {config.objective!r} with allocation {config.allocation!r} needs gradient moments; "
            "calibrate with gradients, or take --objective activation --allocation uniform"
        )
    result = {}
    for name, layer in layers.items():
        result[name] = _decompose_layer(layer, _metric(name, layer, statistics, config), config)
        if progress is not None:
            progress(1)
    return result


def plan_ranks(
    layers: Mapping[str, DenseLinear], decomposed: Mapping[str, Decomposed], config: TruncateConfig
) -> dict[str, int | None]:
    """Ranks by the configured allocation; None leaves a layer dense."""
    shapes = {name: (layer.shape[0], layer.shape[1]) for name, layer in _weights(layers).items()}
    if config.allocation == "uniform":
        return allocation.uniform(shapes, config.keep, config.rank_multiple)
    losses = {name: entry.losses for name, entry in decomposed.items() if entry.losses is not None}
    return allocation.by_loss(shapes, losses, config.keep, config.rank_multiple, config.floor_share)


def truncate(
    layers: Mapping[str, DenseLinear],
    statistics: Statistics,
    config: TruncateConfig,
    *,
    decomposed: Mapping[str, Decomposed] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Truncation:
    """The factors of every targeted layer, balanced and in the layer's own dtype, and what they cost.

    Args:
        layers: dense layers by name; left as they are (see ``converters.lowrank.factorize``).
        decomposed: decompositions of these very weights and statistics, when at hand.

    Raises:
        InputError: gradient moments are needed and missing, or every layer would stay dense.
    """
    decomposed = decomposed or decompose_layers(layers, statistics, config, progress)
    ranks = plan_ranks(layers, decomposed, config)
    factors, results = {}, []
    for name, layer in layers.items():
        metric = _metric(name, layer, statistics, config)
        pair = None if (rank := ranks[name]) is None else _cut(layer, decomposed[name], rank, metric.mean)
        if pair is not None:
            factors[name] = pair
        results.append(_measure(name, layer, pair, metric, config))
    if not factors:
        raise InputError(
            f"no layer gets smaller at --ratio {config.ratio} with --rank-multiple {config.rank_multiple}; "
            "remove more, or take a smaller multiple"
        )
    return Truncation(factors, results)


def _decompose_layer(layer: DenseLinear, metric: Metric, config: TruncateConfig) -> Decomposed:
    weight = dense_weight(layer)
    second = None if config.objective == "weight" else metric.second_moment
    gradient = metric.gradient_moment if config.objective == "fisher" else None
    full = decompose(weight, second, gradient)
    losses = None
    if metric.gradient_moment is not None:
        losses = predicted_loss(full, metric.second_moment, metric.gradient_moment)
    most = allocation.break_even(*weight.shape)
    # float32 holds the cut factors at the dense weight's size; the eigen-step above was float64.
    kept = replace(full, up=full.up[:, :most].float().clone(), down=full.down[:most].float().clone())
    return Decomposed(kept, losses)


def _cut(layer: DenseLinear, entry: Decomposed, rank: int, mean: Tensor | None) -> Factors:
    weight: Tensor = dense_weight(layer).detach()
    up, down = (factor.double() for factor in entry.decomposition.truncated(rank))
    bias = None if layer.bias is None else layer.bias.detach().clone()
    if bias is not None and mean is not None:
        # E[(W − Ŵ)x] is known, so the bias takes it for free; the metric was centred to match.
        bias = (bias.double() + weight.double() @ mean - up @ (down @ mean)).to(weight.dtype)
    up, down = balance(up, down)
    return Factors(up.to(weight.dtype), down.to(weight.dtype), bias)


def _measure(
    name: str, layer: DenseLinear, pair: Factors | None, metric: Metric, config: TruncateConfig
) -> LayerResult:
    """The objective again, of the factors as stored: after balancing and the cast to the storage dtype."""
    weight = dense_weight(layer).detach().double()
    m, n = weight.shape
    if pair is None:
        has_g = metric.gradient_moment is not None
        return LayerResult(name, m, n, None, 0.0, 0.0 if has_g else None, m * n, m * n)
    delta = weight - pair.up.double() @ pair.down.double()
    second = None if config.objective == "weight" else metric.second_moment
    gradient = metric.gradient_moment if config.objective == "fisher" else None
    value = objective_value(delta, second, gradient)
    loss = None
    if metric.gradient_moment is not None:
        loss = 0.5 * objective_value(delta, metric.second_moment, metric.gradient_moment)
    return LayerResult(name, m, n, pair.rank, value, loss, m * n, pair.rank * (m + n))


def _weights(layers: Mapping[str, DenseLinear]) -> dict[str, Tensor]:
    return {name: dense_weight(layer) for name, layer in layers.items()}
