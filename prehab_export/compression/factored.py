"""A compressed model in training: what every verb after the truncation takes."""

from dataclasses import dataclass, field

from torch import nn

from converters.lowrank import low_rank_layers
from prehab_export.compression.bases import factor_bases
from prehab_export.compression.moments import Statistics
from prehab_export.compression.training import Trainable
from prehab_export.inputs import Task
from prehab_export.linalg import Bases


@dataclass(frozen=True)
class Factored:
    """A model with two-factor layers, its task, and the bases in which its factors are stepped (see `factor_bases`);
    without bases, training is plain AdamW."""

    model: nn.Module
    task: Task
    bases: Bases = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, task: Task, statistics: Statistics) -> "Factored":
        """With the bases that the moments of the dense model give."""
        return cls(model, task, factor_bases(model, statistics))

    @property
    def factors(self) -> list[nn.Parameter]:
        """Both factors and the biases of every compressed layer, each once."""
        return factor_parameters(self.model)

    def trainable(self, parameters: list[nn.Parameter] | None = None) -> Trainable:
        """These parameters, or all factors, for the training loop."""
        return Trainable(self.model, parameters or self.factors, self.bases, self.task.precision)


def factor_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Both factors and the biases of every compressed layer of a model or a part of one, each once."""
    found = {id(p): p for layer in low_rank_layers(model).values() for p in layer.parameters()}
    return list(found.values())
