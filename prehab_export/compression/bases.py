"""Computes the bases in which factors are trained: eigenvectors of their layer's moments."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from converters.lowrank import low_rank_layers
from prehab_export.compression.moments import Statistics
from prehab_export.linalg import Bases, Basis


def factor_bases(model: nn.Module, statistics: Statistics, names: Collection[str] | None = None) -> Bases:
    """Return a basis for every factor of the model: eigenvectors of C for ``down``, and of G for ``up`` if G is known.

    Args:
        names: the layers to return bases for; by default all.
    """
    inputs: dict[str, Tensor] = {}
    bases: dict[Tensor, Basis] = {}
    for name, layer in low_rank_layers(model).items():
        if names is not None and name not in names:
            continue
        device, group = layer.up.weight.device, statistics.groups[name]
        if group not in inputs:
            inputs[group] = _eigenvectors(statistics.input_of(name).second_moment, device)
        bases[layer.down.weight] = Basis(right=inputs[group])
        if name in statistics.gradients:
            bases[layer.up.weight] = Basis(left=_eigenvectors(statistics.gradients[name], device))
    return bases


def _eigenvectors(moment: Tensor, device: torch.device) -> Tensor:
    # Any orthonormal basis is valid, so float32 is precise enough.
    return torch.linalg.eigh(moment.float().to(device))[1]
