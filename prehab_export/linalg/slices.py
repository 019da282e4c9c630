"""Whole matrices and slices of them, for parameters that several processes share out (PyTorch's ``DTensor``)."""

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def gathered(values: Tensor) -> Tensor:
    """Return the whole of a tensor that is shared out over processes; an ordinary tensor is whole as it is."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def sliced(values: Tensor, like: Tensor) -> Tensor:
    """Share out a tensor, which all processes hold, as ``like`` is; beside an ordinary tensor it stays whole."""
    if not isinstance(like, DTensor):
        return values
    whole = DTensor.from_local(values.detach(), like.device_mesh, [Replicate()])
    return whole.redistribute(placements=like.placements)
