"""Decomposes every layer once, for all ratios and allocations.

Each layer is decomposed on its own and, if sharing is allowed, together with the layers that read the same input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from converters.errors import InputError
from converters.lowrank import DenseLinear, dense_weight
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.metric import Metric, layer_metric
from prehab_export.config import TruncateConfig
from prehab_export.linalg import (
    Decomposition,
    Group,
    JointDecomposition,
    break_even,
    decompose,
    decompose_jointly,
    predicted_joint_loss,
    predicted_loss,
)
from prehab_export.system import Progress, silent


@dataclass(frozen=True)
class Decomposed:
    """The decomposition of one layer.

    objective: the objective that it minimises.
    decomposition: up to the break-even rank.
    losses: predicted loss at ranks 0, 1, … up to break-even or higher; None if G is not known.
    """

    objective: str
    decomposition: Decomposition
    losses: Tensor | None


@dataclass(frozen=True)
class JointlyDecomposed:
    """The joint decomposition of a group up to its break-even rank, and its predicted loss at joint ranks 0, 1, …"""

    decomposition: JointDecomposition
    losses: Tensor


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


def decompose_layers(calibrated: Calibrated, config: TruncateConfig, *, progress: Progress = silent) -> Decompositions:
    """Decompose every layer under the configured objective, and groups of layers with one input if sharing is allowed.

    The result is at least as large as the layers, and stays on the device of the moments.

    Raises:
        InputError: gradient moments are needed but the statistics hold none.
    """
    layers, statistics = calibrated.layers, calibrated.statistics
    if config.needs_gradients and not statistics.gradients:
        raise InputError(
            f"objective {config.objective!r} with allocation {config.allocation!r} needs gradient moments; "
            "calibrate with gradients, or use --objective activation --allocation uniform"
        )
    single = {}
    with progress("decompose", len(layers)) as advance:
        for name, layer in layers.items():
            metric = layer_metric(name, layer, statistics, config.gradient_shrinkage, config.base_objective)
            single[name] = _decompose_layer(layer, metric, statistics.device)
            advance()
    return with_groups(calibrated, single, config)


def with_groups(calibrated: Calibrated, single: dict[str, Decomposed], config: TruncateConfig) -> Decompositions:
    """Add groups to decompositions of single layers, each under its own objective.

    If inputs may be shared, every group of layers with one input and one metric is decomposed jointly.
    """
    objectives = {name: entry.objective for name, entry in single.items()}
    groups = sharing_candidates(calibrated, objectives) if config.share_inputs else []
    joint = {
        names: _decompose_group(calibrated, names, config.gradient_shrinkage, objectives[names[0]]) for names in groups
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


def _decompose_layer(layer: DenseLinear, metric: Metric, keep_on: torch.device) -> Decomposed:
    weight = dense_weight(layer)
    max_rank = break_even(*weight.shape)
    losses = None
    if metric.objective == "fisher":
        full = decompose(weight, *metric.sides, max_rank)
        losses = 0.5 * full.objectives()  # this objective is twice the predicted loss
    else:
        # The losses are in another metric than the factors, so they need the factors at all ranks.
        full = decompose(weight, *metric.sides)
        if metric.gradient_moment is not None:
            losses = predicted_loss(full, metric.second_moment, metric.gradient_moment)
    sliced = replace(full, up=_stored(full.up[:, :max_rank], keep_on), down=_stored(full.down[:max_rank], keep_on))
    return Decomposed(metric.objective, sliced, losses)


def _decompose_group(
    calibrated: Calibrated, names: Sequence[str], gradient_shrinkage: float, objective: str
) -> JointlyDecomposed:
    layers, statistics = calibrated.layers, calibrated.statistics
    metrics = [layer_metric(name, layers[name], statistics, gradient_shrinkage, objective) for name in names]
    moments = [metric.gradient_moment for metric in metrics if metric.gradient_moment is not None]
    weights = [dense_weight(layers[name]) for name in names]
    max_rank = break_even(sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    if objective == "fisher":
        full = decompose_jointly(weights, metrics[0].sides[0], moments, max_rank)
        losses = 0.5 * full.objectives()
    else:
        full = decompose_jointly(weights, metrics[0].sides[0])
        losses = predicted_joint_loss(full, metrics[0].second_moment, moments)
    ups = tuple(_stored(up[:, :max_rank], statistics.device) for up in full.ups)
    return JointlyDecomposed(replace(full, ups=ups, down=_stored(full.down[:max_rank], statistics.device)), losses)


def _stored(factor: Tensor, device: torch.device) -> Tensor:
    """Copy a factor for later use: float32 keeps it at the dense weight's size, although the eigen-step was float64."""
    return factor.float().clone().to(device)
