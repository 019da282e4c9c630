"""Truncation of a model's targeted layers: decompose each once, share out ranks, cut, balance, measure.

One decomposition a layer serves every ratio and allocation, so it is kept (up to break-even rank, at the size of
the dense weight) and only sliced. Layers with one input are also decomposed together, with one ``down`` between them,
and the allocation takes whichever form predicts less loss.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from converters.errors import InputError
from converters.lowrank import DenseLinear, Factors, LowRankLinear, balance, dense_weight, factorize
from converters.roots import damped, symmetric, weighs
from prehab_export import allocation
from prehab_export.allocation import Cost, Group
from prehab_export.config import TruncateConfig
from prehab_export.decomposition import (
    Decomposition,
    JointDecomposition,
    decompose,
    decompose_jointly,
    objective_value,
    predicted_joint_loss,
    predicted_loss,
)
from prehab_export.devices import device_of
from prehab_export.shrinkage import shrunk
from prehab_export.statistics import Statistics

# Directions that calibration never saw get this share of the mean energy: enough to order them by the weight
# itself when rank is left over, too little to be seen in the objective. C is not shrunk beyond that: a few outlier
# directions hold most of its trace, and a share of that swamps the small eigenvalues, which costs more than the
# sampling error it removes (measured from 8 to 512 samples).
INPUT_DAMPING = 1e-8


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer. ``rank`` None: it stays dense. ``metric``: the objective that chose its factors.
    Losses in nats, per unit."""

    name: str
    out_features: int
    in_features: int
    rank: int | None
    metric: str
    objective: float
    predicted_loss: float | None
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class Refit:
    """New values of a layer that stays dense: weight m×n and bias, fitted to compressed layers before it."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Truncation:
    """New weights of the targeted layers: factors, or for some that stay dense a refit; and what each layer cost.

    Members of a ``shared`` group have the same ``down``. ``notes``: what the user should know.
    """

    factors: dict[str, Factors]
    layers: list[LayerResult]
    refits: dict[str, Refit] = field(default_factory=dict)
    shared: tuple[Group, ...] = ()
    notes: tuple[str, ...] = ()

    @torch.no_grad()
    def apply(self, model: nn.Module) -> nn.Module:
        """Put the new weights into the model, in place; returns it.

        Raises:
            InputError: the model does not have these layers as dense linears of these shapes.
        """
        for name, refit in self.refits.items():
            layer = model.get_submodule(name)
            dense_weight(layer).copy_(refit.weight)
            if isinstance(layer.bias, nn.Parameter) and refit.bias is not None:
                layer.bias.copy_(refit.bias)
        return factorize(model, self.factors)

    @property
    def ranks(self) -> dict[str, int]:
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    def units(self) -> list[tuple[int, int, int | None]]:
        """(m, n, rank) of each layer, None for dense; layers with one ``down`` count as their stack."""
        sizes = {layer.name: (layer.out_features, layer.in_features, layer.rank) for layer in self.layers}
        stacks = [(sum(sizes[name][0] for name in group), *sizes[group[0]][1:]) for group in self.shared]
        grouped = {name for group in self.shared for name in group}
        return [*stacks, *(size for name, size in sizes.items() if name not in grouped)]

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
            "shared_inputs": [list(group) for group in self.shared],
            "layers": [asdict(layer) for layer in self.layers],
        }


@dataclass(frozen=True)
class Metric:
    """The metric of one layer, float64: C (n×n, centred where a bias can take the mean), μ (n) and G (m×m).

    ``objective`` says which of C and G truncation looks at; predicted losses take both.
    """

    objective: str
    second_moment: Tensor
    gradient_moment: Tensor | None
    mean: Tensor | None

    @property
    def sides(self) -> tuple[Tensor | None, Tensor | None]:
        """(C, G) as the objective has them; None for the identity."""
        second = None if self.objective == "weight" else self.second_moment
        return second, self.gradient_moment if self.objective == "fisher" else None

    def loss_of(self, delta: Tensor) -> float | None:
        """Predicted rise of the loss for a change Δ (m×n) of the weight; None where G is not known."""
        if self.gradient_moment is None:
            return None
        return 0.5 * objective_value(delta, self.second_moment, self.gradient_moment)


@dataclass(frozen=True)
class Decomposed:
    """One layer's decomposition under its objective, cut at break-even; its predicted loss at ranks 0 up to break-even
    at least, if G is known."""

    objective: str
    decomposition: Decomposition
    losses: Tensor | None


@dataclass(frozen=True)
class JointlyDecomposed:
    """One group's joint decomposition, cut at its break-even, and its predicted loss at the joint ranks up to there."""

    decomposition: JointDecomposition
    losses: Tensor


# Predicted loss at ranks 0, 1, …: of each layer, and of each group of layers with one ``down``, at joint ranks.
Losses = tuple[dict[str, Tensor], dict[Group, Tensor]]


@dataclass(frozen=True)
class Decompositions:
    """Of every layer, and of every group of layers that may share a ``down``."""

    layers: dict[str, Decomposed]
    groups: dict[Group, JointlyDecomposed] = field(default_factory=dict)

    @property
    def losses(self) -> Losses:
        single = {name: entry.losses for name, entry in self.layers.items() if entry.losses is not None}
        return single, {group: entry.losses for group, entry in self.groups.items()}


@dataclass(frozen=True)
class Plan:
    """Ranks by layer, None for dense; members of a ``shared`` group have one rank and one ``down``."""

    ranks: Mapping[str, int | None]
    shared: tuple[Group, ...] = ()


def layer_metric(
    name: str,
    layer: DenseLinear | LowRankLinear,
    statistics: Statistics,
    gradient_shrinkage: float,
    objective: str = "fisher",
    fold_mean: bool = True,
) -> Metric:
    """C, G and μ of a layer, damped, on its device. Where a bias can take the mean error, C is centred and μ given."""
    moment = statistics.input_of(name).to(device_of(layer))
    # Plain SVD knows nothing of the inputs, their mean included.
    folds = fold_mean and objective != "weight" and layer.bias is not None
    return Metric(
        objective,
        input_metric(moment.centred() if folds else moment.second_moment),
        gradient_metric(name, layer, statistics, gradient_shrinkage),
        moment.mean.double() if folds else None,
    )


def input_metric(moment: Tensor) -> Tensor:
    """C as truncation weighs with it, float64: damped, but zero where nothing ever comes in."""
    return damped(moment, INPUT_DAMPING) if weighs(moment) else torch.zeros_like(symmetric(moment))


def gradient_metric(
    name: str, layer: DenseLinear | LowRankLinear, statistics: Statistics, least: float
) -> Tensor | None:
    """G of a layer, on its device, shrunk towards the mean of its diagonal as far as the sample asks for
    (Ledoit–Wolf), and by the share ``least`` at least; None where it was not collected."""
    if name not in statistics.gradients:
        return None
    gradient = statistics.gradients[name].to(device_of(layer))
    return shrunk(gradient, max(statistics.gradient_sampling[name].intensity(gradient), least))


def decompose_layers(
    layers: Mapping[str, DenseLinear],
    statistics: Statistics,
    config: TruncateConfig,
    progress: Callable[[int], None] | None = None,
) -> Decompositions:
    """Decompose every layer under the configured objective and, where inputs may be shared, the groups of layers that
    read one input. The result, as large as the layers or larger, lies where the moments do.

    Raises:
        InputError: gradient moments are needed and the statistics hold none.
    """
    if config.needs_gradients and not statistics.gradients:
        raise InputError(
            f"objective {config.objective!r} with allocation {config.allocation!r} needs gradient moments; "
            "calibrate with gradients, or take --objective activation --allocation uniform"
        )
    single = {}
    for name, layer in layers.items():
        metric = layer_metric(name, layer, statistics, config.gradient_shrinkage, config.base_objective)
        single[name] = _decompose_layer(layer, metric, statistics.device)
        if progress is not None:
            progress(1)
    return with_groups(single, layers, statistics, config)


def with_groups(
    single: dict[str, Decomposed],
    layers: Mapping[str, DenseLinear],
    statistics: Statistics,
    config: TruncateConfig,
) -> Decompositions:
    """These decompositions of layers, each under an objective of its own, and, where inputs may be shared, those of
    the groups of layers that read one input in one metric."""
    objectives = {name: entry.objective for name, entry in single.items()}
    candidates = sharing_candidates(layers, statistics, objectives) if config.share_inputs else []
    return Decompositions(
        single,
        {names: _decompose_group(names, layers, statistics, config, objectives[names[0]]) for names in candidates},
    )


def sharing_candidates(
    layers: Mapping[str, DenseLinear], statistics: Statistics, objectives: Mapping[str, str]
) -> list[Group]:
    """Layers that may have one ``down``: those with one input and one metric. Without gradient moments there is nothing
    to choose by, hence no group."""
    members: dict[tuple[str, bool, str], list[str]] = {}
    for name, layer in layers.items():
        if name in statistics.gradients:
            # Only layers with a bias have the centred C.
            members.setdefault((statistics.groups[name], layer.bias is None, objectives[name]), []).append(name)
    return [tuple(names) for names in members.values() if len(names) > 1]


def plan_ranks(
    layers: Mapping[str, DenseLinear],
    decomposed: Decompositions,
    config: TruncateConfig,
    cost: Cost = allocation.parameters,
) -> Plan:
    """Ranks by the configured allocation, and which groups are to share their ``down``.

    Args:
        cost: what the budget is counted in.
    """
    return ranks_by(layers, decomposed.losses, config, cost)


def ranks_by(
    layers: Mapping[str, DenseLinear], predicted: Losses, config: TruncateConfig, cost: Cost = allocation.parameters
) -> Plan:
    """`plan_ranks` from predicted losses alone.

    Where the layers are too small to keep to the budget in whole multiples, ranks come in halves of the multiple, or in
    quarters, and so on.
    """
    shapes = {name: (layer.shape[0], layer.shape[1]) for name, layer in _weights(layers).items()}
    budget = config.keep * sum(cost(m, n, None) for m, n in shapes.values())
    multiple = config.multiple
    while True:
        if config.allocation == "uniform" or not any(bool((losses > 0).any()) for losses in predicted[0].values()):
            # Where no layer is predicted to lose anything, there is nothing to choose by.
            plan = Plan(allocation.uniform(shapes, config.keep, multiple))
            spent = sum(cost(*shape, plan.ranks[name]) for name, shape in shapes.items())
        else:
            found = allocation.by_joint_loss(shapes, *predicted, config.keep, multiple, config.floor_share, cost)
            plan, spent = Plan(found.ranks, found.shared), found.cost
        if spent <= budget * (1 + 1e-6) or multiple == 1:
            return plan
        multiple //= 2


def truncate(
    layers: Mapping[str, DenseLinear],
    statistics: Statistics,
    config: TruncateConfig,
    *,
    decomposed: Decompositions | None = None,
    plan: Plan | None = None,
    cost: Cost = allocation.parameters,
    progress: Callable[[int], None] | None = None,
) -> Truncation:
    """The factors of every targeted layer, balanced and in the layer's own dtype, and what they cost.

    Args:
        layers: dense layers by name; left as they are (see ``converters.lowrank.factorize``).
        decomposed: decompositions of these very weights and statistics, when at hand.
        plan: instead of what the allocation would choose.
        cost: what the budget is counted in.

    Raises:
        InputError: gradient moments are needed and missing, or every layer would stay dense.
    """
    decomposed = decomposed or decompose_layers(layers, statistics, config, progress=progress)
    plan = plan or plan_ranks(layers, decomposed, config, cost)

    def metric_of(name: str) -> Metric:
        # One at a time: in float64 all of them together are far larger than the model.
        objective = decomposed.layers[name].objective
        return layer_metric(name, layers[name], statistics, config.gradient_shrinkage, objective)

    factors: dict[str, Factors] = {}
    for group in plan.shared:
        rank = plan.ranks[group[0]]
        assert rank is not None
        ups, down = decomposed.groups[group].decomposition.truncated(rank)
        factors |= _cut(group, layers, ups, down, metric_of(group[0]).mean)
    for name, rank in plan.ranks.items():
        if rank is not None and name not in factors:
            up, down = decomposed.layers[name].decomposition.truncated(rank)
            factors |= _cut((name,), layers, (up,), down, metric_of(name).mean)
    followers = {name for group in plan.shared for name in group[1:]}
    results = [
        _measure(name, layer, factors.get(name), metric_of(name), counts_down=name not in followers)
        for name, layer in layers.items()
    ]
    if not factors:
        reason, advice = "gets smaller", "remove more"
        if config.latency is not None:
            reason, advice = "is faster as two factors on this machine", "take --ratio to make the model smaller anyway"
        raise InputError(f"no layer {reason} at {config.goal}; {advice}")
    return Truncation(factors, results, shared=plan.shared)


def _decompose_layer(layer: DenseLinear, metric: Metric, keep_on: torch.device) -> Decomposed:
    weight = dense_weight(layer)
    most = allocation.break_even(*weight.shape)
    losses = None
    if metric.objective == "fisher":
        full = decompose(weight, *metric.sides, most)
        losses = 0.5 * full.objectives()  # its own objective is the predicted loss
    else:
        # The losses are in another metric than the factors, so they take all ranks' factors.
        full = decompose(weight, *metric.sides)
        if metric.gradient_moment is not None:
            losses = predicted_loss(full, metric.second_moment, metric.gradient_moment)
    kept = replace(full, up=_kept(full.up[:, :most], keep_on), down=_kept(full.down[:most], keep_on))
    return Decomposed(metric.objective, kept, losses)


def _decompose_group(
    names: Sequence[str],
    layers: Mapping[str, DenseLinear],
    statistics: Statistics,
    config: TruncateConfig,
    objective: str,
) -> JointlyDecomposed:
    metrics = [layer_metric(name, layers[name], statistics, config.gradient_shrinkage, objective) for name in names]
    moments = [metric.gradient_moment for metric in metrics if metric.gradient_moment is not None]
    weights = [dense_weight(layers[name]) for name in names]
    most = allocation.break_even(sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    if objective == "fisher":
        full = decompose_jointly(weights, metrics[0].sides[0], moments, most)
        losses = 0.5 * full.objectives()
    else:
        full = decompose_jointly(weights, metrics[0].sides[0])
        losses = predicted_joint_loss(full, metrics[0].second_moment, moments)
    ups = tuple(_kept(up[:, :most], statistics.device) for up in full.ups)
    return JointlyDecomposed(replace(full, ups=ups, down=_kept(full.down[:most], statistics.device)), losses)


def _kept(factor: Tensor, device: torch.device) -> Tensor:
    """A factor to be cut later: float32 holds it at the dense weight's size; the eigen-step was float64."""
    return factor.float().clone().to(device)


def _cut(
    names: Sequence[str],
    layers: Mapping[str, DenseLinear],
    ups: Sequence[Tensor],
    down: Tensor,
    mean: Tensor | None,
) -> dict[str, Factors]:
    """Factors of one layer, or of several with one ``down``."""
    device = device_of(layers[names[0]])
    ups, down, biases = [up.to(device) for up in ups], down.to(device), []
    for name, up in zip(names, ups, strict=True):
        weight, bias = dense_weight(layers[name]).detach(), layers[name].bias
        new = None if bias is None else bias.detach().clone()
        if new is not None and mean is not None:
            # E[(W − Ŵ)x] is known, so the bias takes it for free; the metric was centred to match.
            new = (new.double() + weight.double() @ mean - up.double() @ (down.double() @ mean)).to(new.dtype)
        biases.append(new)
    return dict(zip(names, stored_factors(ups, down, biases, layers[names[0]].weight.dtype), strict=True))


def stored_factors(
    ups: Sequence[Tensor], down: Tensor, biases: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Factors]:
    """Factors in the storage dtype, balanced together; one ``down`` tensor for all."""
    stacked, down = balance(torch.cat(list(ups)).double(), down.double())
    stored = down.to(dtype)
    parts = stacked.split([len(up) for up in ups])
    return [Factors(up.to(dtype), stored, bias) for up, bias in zip(parts, biases, strict=True)]


def _measure(
    name: str, layer: DenseLinear, pair: Factors | None, metric: Metric, counts_down: bool = True
) -> LayerResult:
    """The objective again, of the factors as stored: after balancing and the cast to the storage dtype."""
    weight = dense_weight(layer).detach().double()
    m, n = weight.shape
    delta = torch.zeros_like(weight) if pair is None else weight - pair.up.double() @ pair.down.double()
    return LayerResult(
        name=name,
        out_features=m,
        in_features=n,
        rank=None if pair is None else pair.rank,
        metric=metric.objective,
        objective=objective_value(delta, *metric.sides),
        predicted_loss=metric.loss_of(delta),
        parameters_before=m * n,
        parameters_after=m * n if pair is None else pair.rank * (m + n if counts_down else m),
    )


def _weights(layers: Mapping[str, DenseLinear]) -> dict[str, Tensor]:
    return {name: dense_weight(layer) for name, layer in layers.items()}
