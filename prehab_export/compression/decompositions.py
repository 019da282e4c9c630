"""Every layer decomposed once, for all ratios and allocations: each by itself, and together with the layers that read
the same input, where those may share a ``down``."""

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


def decompose_layers(calibrated: Calibrated, config: TruncateConfig, *, progress: Progress = silent) -> Decompositions:
    """Decompose every layer under the configured objective and, where inputs may be shared, the groups of layers that
    read one input. The result, as large as the layers or larger, lies where the moments do.

    Raises:
        InputError: gradient moments are needed and the statistics hold none.
    """
    layers, statistics = calibrated.layers, calibrated.statistics
    if config.needs_gradients and not statistics.gradients:
        raise InputError(
            f"objective {config.objective!r} with allocation {config.allocation!r} needs gradient moments; "
            "calibrate with gradients, or take --objective activation --allocation uniform"
        )
    single = {}
    with progress("decompose", len(layers)) as advance:
        for name, layer in layers.items():
            metric = layer_metric(name, layer, statistics, config.gradient_shrinkage, config.base_objective)
            single[name] = _decompose_layer(layer, metric, statistics.device)
            advance()
    return with_groups(calibrated, single, config)


def with_groups(calibrated: Calibrated, single: dict[str, Decomposed], config: TruncateConfig) -> Decompositions:
    """These decompositions of layers, each under an objective of its own, and, where inputs may be shared, those of
    the groups of layers that read one input in one metric."""
    objectives = {name: entry.objective for name, entry in single.items()}
    groups = sharing_candidates(calibrated, objectives) if config.share_inputs else []
    joint = {
        names: _decompose_group(calibrated, names, config.gradient_shrinkage, objectives[names[0]]) for names in groups
    }
    return Decompositions(single, joint)


def sharing_candidates(calibrated: Calibrated, objectives: Mapping[str, str]) -> list[Group]:
    """Layers that may have one ``down``: those with one input and one metric. Without gradient moments there is nothing
    to choose by, hence no group."""
    statistics = calibrated.statistics
    members: dict[tuple[str, bool, str], list[str]] = {}
    for name, layer in calibrated.layers.items():
        if name in statistics.gradients:
            # Only layers with a bias have the centred C.
            members.setdefault((statistics.groups[name], layer.bias is None, objectives[name]), []).append(name)
    return [tuple(names) for names in members.values() if len(names) > 1]


def _decompose_layer(layer: DenseLinear, metric: Metric, keep_on: torch.device) -> Decomposed:
    weight = dense_weight(layer)
    most = break_even(*weight.shape)
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
    calibrated: Calibrated, names: Sequence[str], gradient_shrinkage: float, objective: str
) -> JointlyDecomposed:
    layers, statistics = calibrated.layers, calibrated.statistics
    metrics = [layer_metric(name, layers[name], statistics, gradient_shrinkage, objective) for name in names]
    moments = [metric.gradient_moment for metric in metrics if metric.gradient_moment is not None]
    weights = [dense_weight(layers[name]) for name in names]
    most = break_even(sum(weight.shape[0] for weight in weights), weights[0].shape[1])
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
