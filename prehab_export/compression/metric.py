"""Builds the metric in which a layer is truncated from its moments, with damping and shrinkage."""

from dataclasses import dataclass

import torch
from torch import Tensor

from converters.lowrank import DenseLinear, LowRankLinear
from converters.roots import damped, symmetric, weighs
from prehab_export.compression.moments import Statistics
from prehab_export.inputs import device_of
from prehab_export.linalg import objective_value, shrunk

# Directions that calibration never saw get this share of the mean energy: enough to order them by the weight itself if
# rank is left over, too little to affect the objective. C is not shrunk any further: a few outlier directions hold most
# of its trace, and a share of that would swamp the small eigenvalues, which costs more than the sampling error that it
# removes (measured from 8 to 512 samples).
INPUT_DAMPING = 1e-8


@dataclass(frozen=True)
class Metric:
    """The metric of one layer in float64.

    objective: decides which of C and G truncation uses; predicted losses use both.
    second_moment: C (n×n), centred if a bias can absorb the mean.
    gradient_moment: G (m×m); None if it was not gathered.
    mean: μ (n); None if no bias absorbs it.
    """

    objective: str
    second_moment: Tensor
    gradient_moment: Tensor | None
    mean: Tensor | None

    @property
    def sides(self) -> tuple[Tensor | None, Tensor | None]:
        """(C, G) as the objective uses them; None stands for the identity."""
        second = None if self.objective == "weight" else self.second_moment
        return second, self.gradient_moment if self.objective == "fisher" else None

    def loss_of(self, delta: Tensor) -> float | None:
        """Return the predicted increase in loss for a change Δ (m×n) of the weight; None if G is not known."""
        if self.gradient_moment is None:
            return None
        return 0.5 * objective_value(delta, self.second_moment, self.gradient_moment)


def layer_metric(
    name: str,
    layer: DenseLinear | LowRankLinear,
    statistics: Statistics,
    gradient_shrinkage: float,
    objective: str = "fisher",
    fold_mean: bool = True,
) -> Metric:
    """Return the metric of a layer on the layer's device, with C damped and G shrunk.

    Args:
        fold_mean: if the layer has a bias, let it absorb the mean error: C is then centred, and μ given.
    """
    moment = statistics.input_of(name).to(device_of(layer))
    # Plain SVD does not use the inputs, nor their mean.
    folds = fold_mean and objective != "weight" and layer.bias is not None
    return Metric(
        objective,
        input_metric(moment.centred() if folds else moment.second_moment),
        gradient_metric(name, layer, statistics, gradient_shrinkage),
        moment.mean.double() if folds else None,
    )


def input_metric(moment: Tensor) -> Tensor:
    """Return C in float64, damped for truncation; an input that is always zero keeps C = 0."""
    return damped(moment, INPUT_DAMPING) if weighs(moment) else torch.zeros_like(symmetric(moment))


def gradient_metric(
    name: str, layer: DenseLinear | LowRankLinear, statistics: Statistics, min_shrinkage: float
) -> Tensor | None:
    """Return G of a layer on the layer's device, shrunk towards the mean of its diagonal; None if it was not gathered.

    The shrinkage is the one that the sample calls for (Ledoit–Wolf), or ``min_shrinkage`` if that is larger.
    """
    if name not in statistics.gradients:
        return None
    gradient = statistics.gradients[name].to(device_of(layer))
    return shrunk(gradient, max(statistics.gradient_sampling[name].intensity(gradient), min_shrinkage))
