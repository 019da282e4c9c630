"""Decomposes every layer once, for all ratios and allocations.

Each layer is decomposed on its own and, if sharing is allowed, together with the layers that read the same input.
Processes that work together share out the layers' spectra.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from converters.errors import InputError
from converters.lowrank import dense_weight
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.metric import Metric, layer_metric
from prehab_export.compression.spool import Folders, Spool, spool_in
from prehab_export.config import TruncateConfig
from prehab_export.linalg import (
    Decomposition,
    Group,
    JointDecomposition,
    break_even,
    decompose,
    decompose_jointly,
    eigenvalues,
    joint_eigenvalues,
    predicted_joint_loss,
    predicted_loss,
    tails,
)
from prehab_export.system import Progress, silent, team


@dataclass(frozen=True)
class Decomposed:
    """The decomposition of one layer.

    objective: the objective that it minimises.
    values: the objective's value at ranks 0, 1, … up to break-even or higher, float64.
    losses: predicted loss at these ranks; None if G is not known.
    factors: rank → factors (m×r, r×n), not balanced. They are computed anew each time, unless they were kept.
    """

    objective: str
    values: Tensor
    losses: Tensor | None
    factors: Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class JointlyDecomposed:
    """The joint decomposition of a group.

    values: the objective's value at joint ranks 0, 1, … up to break-even or higher, float64.
    losses: predicted loss at these ranks.
    factors: joint rank → one up (mᵢ×r) per member, and their down (r×n); as in `Decomposed`.
    """

    values: Tensor
    losses: Tensor
    factors: Callable[[int], tuple[tuple[Tensor, ...], Tensor]]


# Predicted loss at ranks 0, 1, … of each layer, and at joint ranks of each group of layers with one ``down``.
Losses = tuple[dict[str, Tensor], dict[Group, Tensor]]


@dataclass(frozen=True)
class Decompositions:
    """Decompositions of every layer, and of every group of layers that may share a ``down``."""

    layers: dict[str, Decomposed]
    groups: dict[Group, JointlyDecomposed] = field(default_factory=dict)

    @property
    def losses(self) -> Losses:
        """Predicted losses of all layers for which G is known, and of all groups."""
        single = {name: entry.losses for name, entry in self.layers.items() if entry.losses is not None}
        return single, {group: entry.losses for group, entry in self.groups.items()}


def decompose_layers(
    calibrated: Calibrated, config: TruncateConfig, *, keep: Folders | None = None, progress: Progress = silent
) -> Decompositions:
    """Decompose every layer under the configured objective, and groups of layers with one input if sharing is allowed.

    Args:
        keep: where to keep the factors of every layer up to its break-even rank, which serve all ratios; they take as
            much as the layers. By default, only spectra are computed now, and factors when they are asked for.

    Raises:
        InputError: gradient moments are needed but the statistics hold none.
    """
    layers, statistics = calibrated.layers, calibrated.statistics
    if config.needs_gradients and not statistics.gradients:
        raise InputError(
            f"objective {config.objective!r} with allocation {config.allocation!r} needs gradient moments; "
            "calibrate with gradients, or use --objective activation --allocation uniform"
        )
    single, spool = {}, None if keep is None else spool_in(keep)
    costs = [float(m) ** 3 + float(n) ** 3 for m, n in calibrated.shapes.values()]
    owners = team().owners(costs) if keep is None else [team().rank] * len(layers)
    with progress("decompose", len(layers)) as advance:
        for name, owner in zip(layers, owners, strict=True):
            if owner == team().rank:
                single[name] = _decompose_layer(calibrated, name, config, spool)
            advance()
    if keep is None:
        single = _exchanged(calibrated, single, config)
    return with_groups(calibrated, single, config, spool)


def _exchanged(calibrated: Calibrated, mine: dict[str, Decomposed], config: TruncateConfig) -> dict[str, Decomposed]:
    """Return the decompositions of all layers, of which each process has some; factors are computed where needed."""
    if team().size == 1:
        return mine
    spectra = {
        name: (each.objective, each.values.cpu(), None if each.losses is None else each.losses.cpu())
        for name, each in mine.items()
    }
    found = {name: spectrum for each in team().from_each(spectra) for name, spectrum in each.items()}
    result = {}
    for name, layer in calibrated.layers.items():
        (objective, values, losses), device = found[name], dense_weight(layer).device
        losses = None if losses is None else losses.to(device)
        factors = partial(_factors_at, calibrated, name, config)
        result[name] = Decomposed(objective, values.to(device), losses, factors)
    return result


def with_groups(
    calibrated: Calibrated, single: dict[str, Decomposed], config: TruncateConfig, keep: Spool | None = None
) -> Decompositions:
    """Add groups to decompositions of single layers, each under its own objective.

    If inputs may be shared, every group of layers with one input and one metric is decomposed jointly.
    """
    objectives = {name: entry.objective for name, entry in single.items()}
    groups = sharing_candidates(calibrated, objectives) if config.share_inputs else []
    joint = {
        names: _decompose_group(calibrated, names, config.gradient_shrinkage, objectives[names[0]], keep)
        for names in groups
    }
    return Decompositions(single, joint)


def sharing_candidates(calibrated: Calibrated, objectives: Mapping[str, str]) -> list[Group]:
    """Return groups of layers that may share a ``down``: those with one input and one metric.

    Without gradient moments there are no predicted losses to compare, hence no groups.
    """
    statistics = calibrated.statistics
    members: dict[tuple[str, bool, str], list[str]] = {}
    for name, layer in calibrated.layers.items():
        if name in statistics.gradients:
            # Layers with a bias use the centred C, the others do not.
            members.setdefault((statistics.groups[name], layer.bias is None, objectives[name]), []).append(name)
    return [tuple(names) for names in members.values() if len(names) > 1]


def _decompose_layer(calibrated: Calibrated, name: str, config: TruncateConfig, keep: Spool | None) -> Decomposed:
    weight = dense_weight(calibrated.layer(name))
    metric, max_rank = _metric_of(calibrated, name, config), break_even(*weight.shape)
    full: Decomposition | None
    losses: Tensor | None
    if metric.objective != "fisher" and metric.gradient_moment is not None:
        # The losses are in another metric than the factors, so they need the factors at all ranks.
        full = decompose(weight, *metric.sides)
        values, losses = full.objectives(), predicted_loss(full, metric.second_moment, metric.gradient_moment)
    else:
        full = None if keep is None else decompose(weight, *metric.sides, max_rank)
        values = tails(eigenvalues(weight, *metric.sides)) if full is None else full.objectives()
        losses = 0.5 * values if metric.objective == "fisher" else None  # this objective is twice the predicted loss
    if full is None or keep is None:
        return Decomposed(metric.objective, values, losses, partial(_factors_at, calibrated, name, config))
    up, down = (keep.keep(_stored(factor)) for factor in full.truncated(max_rank))
    return Decomposed(metric.objective, values, losses, lambda rank: (up.load()[:, :rank], down.load()[:rank]))


def _metric_of(calibrated: Calibrated, name: str, config: TruncateConfig) -> Metric:
    layer, statistics = calibrated.layer(name), calibrated.statistics
    return layer_metric(name, layer, statistics, config.gradient_shrinkage, config.base_objective)


def _factors_at(calibrated: Calibrated, name: str, config: TruncateConfig, rank: int) -> tuple[Tensor, Tensor]:
    sides = _metric_of(calibrated, name, config).sides
    return decompose(dense_weight(calibrated.layer(name)), *sides, rank).truncated(rank)


def _decompose_group(
    calibrated: Calibrated, names: Sequence[str], gradient_shrinkage: float, objective: str, keep: Spool | None
) -> JointlyDecomposed:
    weights = [dense_weight(calibrated.layer(name)) for name in names]

    def moments_of_group() -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Return the C that predicts losses, that of the objective, and the Gs."""
        statistics = calibrated.statistics
        metrics = [
            layer_metric(name, calibrated.layer(name), statistics, gradient_shrinkage, objective) for name in names
        ]
        gradients = [metric.gradient_moment for metric in metrics if metric.gradient_moment is not None]
        return metrics[0].second_moment, metrics[0].sides[0], gradients

    def factors(rank: int) -> tuple[tuple[Tensor, ...], Tensor]:
        _, second, gradients = moments_of_group()
        return decompose_jointly(weights, second, gradients if objective == "fisher" else None, rank).truncated(rank)

    second, used_second, gradients = moments_of_group()
    full: JointDecomposition | None
    max_rank = break_even(sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    if objective != "fisher":
        full = decompose_jointly(weights, used_second)
        values, losses = full.objectives(), predicted_joint_loss(full, second, gradients)
    else:
        full = None if keep is None else decompose_jointly(weights, used_second, gradients, max_rank)
        values = tails(joint_eigenvalues(weights, used_second, gradients)) if full is None else full.objectives()
        losses = 0.5 * values
    if full is None or keep is None:
        return JointlyDecomposed(values, losses, factors)
    ups, down = full.truncated(max_rank)
    kept, kept_down = [keep.keep(_stored(up)) for up in ups], keep.keep(_stored(down))
    return JointlyDecomposed(
        values, losses, lambda rank: (tuple(up.load()[:, :rank] for up in kept), kept_down.load()[:rank])
    )


def _stored(factor: Tensor) -> Tensor:
    """Copy a factor for later use: float32 keeps it at the dense weight's size, although the eigen-step was float64."""
    return factor.float().clone()
