"""Defines `Factored`, a compressed model to train: the input of every function that works after truncation."""

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
    """A model with two-factor layers, its task, and the bases in which its factors are trained (see `factor_bases`).

    Without bases, training is plain AdamW.
    """

    model: nn.Module
    task: Task
    bases: Bases = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, task: Task, statistics: Statistics) -> "Factored":
        """Build a `Factored` with bases from the moments of the dense model."""
        return cls(model, task, factor_bases(model, statistics))

    @property
    def factors(self) -> list[nn.Parameter]:
        """Both factors and the bias of every compressed layer, each parameter once."""
        return factor_parameters(self.model)

    def trainable(self, parameters: list[nn.Parameter] | None = None) -> Trainable:
        """Return these parameters, by default all factors, for the training loop."""
        return Trainable(self.model, parameters or self.factors, self.bases, self.task.precision)


def factor_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return both factors and the bias of every compressed layer in a module, each parameter once."""
    by_id = {id(p): p for layer in low_rank_layers(model).values() for p in layer.parameters()}
    return list(by_id.values())
