"""A dense model with what calibration knows of it: the one thing that every verb before the factors takes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from converters.errors import InputError
from converters.lowrank import DenseLinear, dense_weight
from prehab_export.compression.moments import Statistics
from prehab_export.inputs import Task
from prehab_export.linalg import Cost, parameters


@dataclass(frozen=True)
class Calibrated:
    """A dense model, its task, and the moments of the layers to compress. `calibrate` makes one; moments read from a
    file (`load_statistics`) and the model that they were gathered from make one too.

    The layers are looked up in the model by the names that the moments have, so that the two cannot fall out of step.

    cost: what a layer costs at a rank, and so what a budget of ranks is counted in: parameters, or seconds that were
    measured where the model will run (``measurement.RankTimes.cost``).

    Raises (when made):
        InputError: the model has no such linear layers, or layers of other sizes.
    """

    model: nn.Module
    task: Task
    statistics: Statistics
    cost: Cost = parameters

    def __post_init__(self) -> None:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name in self.statistics.groups:
            if not hasattr(modules.get(name), "weight"):
                raise InputError(f"the moments are of another model: this one has no linear layer {name}")
            width, known = dense_weight(modules[name]).shape[1], self.statistics.input_of(name).mean.numel()
            if width != known:
                raise InputError(f"the moments are of another model: {name} has {width} inputs here, {known} there")

    @property
    def layers(self) -> Mapping[str, DenseLinear]:
        """The layers to compress by name, in the order in which they were selected."""
        return {name: self.model.get_submodule(name) for name in self.statistics.groups}  # type: ignore[misc]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(m, n) of each layer's weight."""
        weights = {name: dense_weight(layer) for name, layer in self.layers.items()}
        return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}

    def with_statistics(self, statistics: Statistics) -> "Calibrated":
        """The same model with other moments of it."""
        return replace(self, statistics=statistics)
