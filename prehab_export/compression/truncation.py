"""Truncates a model's selected layers: decompose each layer once, allocate ranks, cut, balance and measure.

One decomposition per layer serves every ratio and allocation. It is stored up to the break-even rank, at the size of
the dense weight, and only sliced afterwards. Layers with the same input are also decomposed together, with one shared
``down``, and the allocation chooses the form with the lower predicted loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from converters.errors import InputError
from converters.lowrank import DenseLinear, Factors, balance, dense_weight, factorize, replace_weight
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.decompositions import Decompositions, decompose_layers
from prehab_export.compression.metric import Metric, layer_metric
from prehab_export.compression.moments import Lookup
from prehab_export.compression.planning import RankPlan, plan_ranks
from prehab_export.compression.spool import Folders
from prehab_export.config import TruncateConfig
from prehab_export.inputs import device_of
from prehab_export.linalg import Group, objective_value
from prehab_export.system import Progress, silent


@dataclass(frozen=True)
class LayerResult:
    """The result of truncating one layer.

    rank: None if the layer stays dense.
    metric: the objective that chose the factors.
    objective: its value for the stored factors.
    predicted_loss: predicted increase in loss in nats per unit; None if G is not known.
    """

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
    """A new weight (m×n) and bias of a layer that stays dense, fitted to the compressed layers before it."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Truncation:
    """New weights of the selected layers, and the results of every layer.

    factors: layer → its factors.
    refits: layer that stays dense → its new weight, if drift correction fitted one.
    shared: groups of layers with the same ``down``.
    notes: messages for the user.
    """

    factors: Mapping[str, Factors]
    layers: list[LayerResult]
    refits: dict[str, Refit] = field(default_factory=dict)
    shared: tuple[Group, ...] = ()
    notes: tuple[str, ...] = ()

    @torch.no_grad()
    def apply(self, model: nn.Module, *, copy: bool = True) -> nn.Module:
        """Put the new weights into the model, in place, and return it. Its old weights do not change: they may belong
        to another model too.

        Args:
            copy: copy the factors, so that changes to the model do not change them.

        Raises:
            InputError: the model does not have these layers, as dense linear layers of these shapes.
        """
        for name, refit in self.refits.items():
            replace_weight(model.get_submodule(name), refit.weight, refit.bias)
        return factorize(model, dict(self.factors), copy=copy)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every factored layer."""
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    def units(self) -> list[tuple[int, int, int | None]]:
        """Return (m, n, rank) of each layer, with rank None if dense; a group that shares its ``down`` is one stack."""
        sizes = {layer.name: (layer.out_features, layer.in_features, layer.rank) for layer in self.layers}
        stacks = [(sum(sizes[name][0] for name in group), *sizes[group[0]][1:]) for group in self.shared]
        grouped = {name for group in self.shared for name in group}
        return [*stacks, *(size for name, size in sizes.items() if name not in grouped)]

    def summary(self) -> dict:
        """Return the entries for the report."""
        before = sum(layer.parameters_before for layer in self.layers)
        after = sum(layer.parameters_after for layer in self.layers)
        losses = [layer.predicted_loss for layer in self.layers if layer.predicted_loss is not None]
        return {
            "selected_parameters_before": before,
            "selected_parameters_after": after,
            "selected_share_removed": 1 - after / before,
            # One multiply-add per weight and token, so both counts are the same for the selected layers.
            "selected_multiply_adds_per_token_before": before,
            "selected_multiply_adds_per_token_after": after,
            "predicted_loss_increase": sum(losses) if losses else None,
            "layers_factored": len(self.factors),
            "layers_dense": len(self.layers) - len(self.factors),
            "shared_inputs": [list(group) for group in self.shared],
            "layers": [asdict(layer) for layer in self.layers],
        }


def truncate(
    calibrated: Calibrated,
    config: TruncateConfig,
    *,
    decomposed: Decompositions | None = None,
    plan: RankPlan | None = None,
    progress: Progress = silent,
) -> Truncation:
    """Compute the factors of every layer to compress, balanced.

    They have the layer's own dtype or, if that is half precision, float32. The model does not change (see
    `Truncation.apply`).

    Args:
        decomposed: decompositions of these weights and moments, if they exist already.
        plan: ranks to use instead of those that the allocation would choose.

    Raises:
        InputError: gradient moments are needed but missing, or every layer would stay dense.
    """
    decomposed = decomposed or decompose_layers(calibrated, config, keep=Folders(), progress=progress)
    planned = plan_truncation(calibrated, config, decomposed, plan)
    factors, followers = dict(planned.factors), {name for group in planned.shared for name in group[1:]}
    results = []
    for name, layer in calibrated.layers.items():
        # One at a time: in float64, all metrics together are far larger than the model.
        objective = decomposed.layers[name].objective
        metric = layer_metric(name, layer, calibrated.statistics, config.gradient_shrinkage, objective)
        results.append(_measure(name, layer, factors.get(name), metric, counts_down=name not in followers))
    return Truncation(factors, results, shared=planned.shared)


def plan_truncation(
    calibrated: Calibrated, config: TruncateConfig, decomposed: Decompositions, plan: RankPlan | None = None
) -> Truncation:
    """Return what `truncate` returns, with factors that are computed when they are looked up.

    The results are predicted from the decompositions.

    Members of a group with one ``down`` follow one another, and get one tensor if they are looked up in this order.
    The predicted loss of a group is divided between them in proportion to what their own factors would lose.

    Raises:
        InputError: every layer would stay dense.
    """
    plan = plan or plan_ranks(calibrated, decomposed, config)
    units = [*plan.shared, *((name,) for name in plan.ranks if not any(name in group for group in plan.shared))]
    units = [unit for unit in units if plan.ranks[unit[0]] is not None]
    if not units:
        reason, advice = "gets smaller", "remove more"
        if config.latency is not None:
            reason, advice = "is faster as two factors on this machine", "use --ratio to make the model smaller anyway"
        raise InputError(f"no layer {reason} at {config.goal}; {advice}")
    unit_of = {name: unit for unit in units for name in unit}
    latest: dict[str, Factors] = {}

    def factors_of_layer(name: str) -> Factors:
        if name not in latest:
            latest.clear()
            latest.update(_unit_factors(calibrated, config, decomposed, unit_of[name], plan.ranks[name]))
        return latest[name]

    results = [_predict(calibrated, decomposed, plan, name, unit_of.get(name, (name,))) for name in calibrated.layers]
    return Truncation(Lookup(unit_of, factors_of_layer), results, shared=plan.shared)


def _unit_factors(
    calibrated: Calibrated, config: TruncateConfig, decomposed: Decompositions, unit: Group, rank: int | None
) -> dict[str, Factors]:
    """Return the factors of one layer, or of several layers with one ``down``."""
    assert rank is not None
    if len(unit) > 1:
        ups, down = decomposed.groups[unit].factors(rank)
    else:
        up, down = decomposed.layers[unit[0]].factors(rank)
        ups = (up,)
    layers, objective = calibrated.layers, decomposed.layers[unit[0]].objective
    metric = layer_metric(unit[0], layers[unit[0]], calibrated.statistics, config.gradient_shrinkage, objective)
    return _cut(unit, layers, ups, down, metric.mean)


def _predict(calibrated: Calibrated, decomposed: Decompositions, plan: RankPlan, name: str, unit: Group) -> LayerResult:
    """Return the result that a layer's decomposition predicts."""
    (m, n), rank, entry = dense_weight(calibrated.layer(name)).shape, plan.ranks[name], decomposed.layers[name]
    objective, loss = 0.0, None if entry.losses is None else 0.0
    if rank is not None and len(unit) > 1:
        joint, members = decomposed.groups[unit], [decomposed.layers[member] for member in unit]
        index = unit.index(name)
        objective = _divided(joint.values, [member.values for member in members], rank)[index]
        losses = [member.losses for member in members if member.losses is not None]
        loss = None if loss is None else _divided(joint.losses, losses, rank)[index]
    elif rank is not None:
        objective, loss = float(entry.values[rank]), None if entry.losses is None else float(entry.losses[rank])
    return LayerResult(
        name=name,
        out_features=m,
        in_features=n,
        rank=rank,
        metric=entry.objective,
        objective=objective,
        predicted_loss=loss,
        parameters_before=m * n,
        parameters_after=_parameters_after(m, n, rank, counts_down=name == unit[0]),
    )


def _divided(joint: Tensor, own: Sequence[Tensor], rank: int) -> list[float]:
    """Divide the joint value at a rank between members, in proportion to their own values at this rank.

    Args:
        joint: values at joint ranks 0, 1, …
        own: the same of each member; the joint rank may be higher than a member's full rank.
    """
    shares = torch.stack([values[min(rank, len(values) - 1)] for values in own])
    shares = shares / shares.sum() if shares.sum() > 0 else torch.full_like(shares, 1 / len(shares))
    return (joint[rank] * shares).tolist()


def _parameters_after(m: int, n: int, rank: int | None, *, counts_down: bool) -> int:
    return m * n if rank is None else rank * (m + n if counts_down else m)


def _cut(
    names: Sequence[str],
    layers: Mapping[str, DenseLinear],
    ups: Sequence[Tensor],
    down: Tensor,
    mean: Tensor | None,
) -> dict[str, Factors]:
    """Return the factors of one layer, or of several layers with one ``down``."""
    device = device_of(layers[names[0]])
    ups, down, biases = [up.to(device) for up in ups], down.to(device), []
    for name, up in zip(names, ups, strict=True):
        weight, bias = dense_weight(layers[name]).detach(), layers[name].bias
        new_bias = None if bias is None else bias.detach().to(computed_dtype(layers[name]), copy=True)
        if new_bias is not None and mean is not None:
            # The bias absorbs the mean error E[(W − Ŵ)x] at no cost; the metric is centred accordingly.
            corrected = new_bias.double() + weight.double() @ mean - up.double() @ (down.double() @ mean)
            new_bias = corrected.to(new_bias.dtype)
        biases.append(new_bias)
    return dict(zip(names, stored_factors(ups, down, biases, computed_dtype(layers[names[0]])), strict=True))


def computed_dtype(layer: DenseLinear) -> torch.dtype:
    """Return the dtype of new weights for a layer: its own, or float32 if its weights are held in half precision."""
    return torch.promote_types(layer.weight.dtype, torch.float32)


def stored_factors(
    ups: Sequence[Tensor], down: Tensor, biases: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Factors]:
    """Return factors in the storage dtype, balanced together, with one ``down`` tensor for all layers."""
    stacked, down = balance(torch.cat(list(ups)).double(), down.double())
    stored = down.to(dtype)
    parts = stacked.split([len(up) for up in ups])
    return [Factors(up.to(dtype), stored, bias) for up, bias in zip(parts, biases, strict=True)]


def _measure(
    name: str, layer: DenseLinear, pair: Factors | None, metric: Metric, counts_down: bool = True
) -> LayerResult:
    """Measure the objective for the factors as stored, after balancing and the cast to the storage dtype."""
    weight = dense_weight(layer).detach().double()
    m, n = weight.shape
    delta = None if pair is None else weight - pair.up.double() @ pair.down.double()
    objective = 0.0 if delta is None else objective_value(delta, *metric.sides)
    if delta is None:
        loss = None if metric.gradient_moment is None else 0.0
    else:  # the objective of fisher is twice the predicted loss
        loss = 0.5 * objective if metric.objective == "fisher" else metric.loss_of(delta)
    return LayerResult(
        name=name,
        out_features=m,
        in_features=n,
        rank=None if pair is None else pair.rank,
        metric=metric.objective,
        objective=objective,
        predicted_loss=loss,
        parameters_before=m * n,
        parameters_after=_parameters_after(m, n, None if pair is None else pair.rank, counts_down=counts_down),
    )
