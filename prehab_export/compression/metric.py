"""The metric in which a layer is truncated: its moments, damped and shrunk."""

from dataclasses import dataclass

import torch
from torch import Tensor

from converters.lowrank import DenseLinear, LowRankLinear
from converters.roots import damped, symmetric, weighs
from prehab_export.compression.moments import Statistics
from prehab_export.inputs import device_of
from prehab_export.linalg import objective_value, shrunk

# Directions that calibration never saw get this share of the mean energy: enough to order them by the weight
# itself when rank is left over, too little to be seen in the objective. C is not shrunk beyond that: a few outlier
# directions hold most of its trace, and a share of that swamps the small eigenvalues, which costs more than the
# sampling error it removes (measured from 8 to 512 samples).
INPUT_DAMPING = 1e-8


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
