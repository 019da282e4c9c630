"""Defines `Calibrated`, a dense model with its moments: the input of every function that works before truncation."""

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
    """A dense model, its task, and the moments of the layers to compress.

    `calibrate` creates one. It can also be created from moments read from a file (`load_statistics`) and the model that
    they were gathered from. Layers are looked up in the model by the names in the moments, so the two always match.

    cost: the cost of a layer at a rank, which is the unit of a budget: parameters, or seconds measured where the model
        will run (``measurement.RankTimes.cost``).

    Raises (when created):
        InputError: the model has no linear layers with these names, or their sizes differ.
    """

    model: nn.Module
    task: Task
    statistics: Statistics
    cost: Cost = parameters

    def __post_init__(self) -> None:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name in self.statistics.groups:
            if not isinstance(modules.get(name), DenseLinear):
                raise InputError(f"the moments belong to another model: this one has no linear layer {name}")
            width, moments_width = dense_weight(modules[name]).shape[1], self.statistics.input_of(name).mean.numel()
            if width != moments_width:
                raise InputError(
                    f"the moments belong to another model: {name} has {width} inputs in this model, {moments_width} in "
                    "the moments"
                )

    @property
    def layers(self) -> Mapping[str, DenseLinear]:
        """The layers to compress, by name, in the order in which they were selected."""
        return {name: self.layer(name) for name in self.statistics.groups}

    def layer(self, name: str) -> DenseLinear:
        """One of the layers; cheaper than ``layers``, which looks up all of them, for whoever needs one at a time."""
        return self.model.get_submodule(name)  # type: ignore[return-value]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(m, n) of each layer's weight."""
        weights = {name: dense_weight(layer) for name, layer in self.layers.items()}
        return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}

    def with_statistics(self, statistics: Statistics) -> "Calibrated":
        """Return the same model with other moments."""
        return replace(self, statistics=statistics)
