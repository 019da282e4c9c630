"""Trace a model in float32 although its weights are stored in half precision, without a float32 copy of it.

Tracing needs the shapes of the weights, not their values. So float32 tensors of zeros stand in for the weights while a
model is traced: memory that is only read takes no space. The graph then gets the stored weights, which are converted
one at a time when they are written.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


class WidenedTensor(ir.Tensor):
    """A float32 tensor of a graph that is stored in half precision; it is converted at each access."""

    def __init__(self, stored: Tensor, name: str | None = None) -> None:
        super().__init__(stored, dtype=ir.DataType.FLOAT, name=name)

    def numpy(self) -> NDArray[np.float32]:
        stored: Tensor = self.raw  # type: ignore[assignment]
        return stored.detach().to(torch.float32, memory_format=torch.contiguous_format).numpy()

    def __array__(self, dtype: object = None, copy: bool | None = None) -> NDArray[np.float32]:
        return self.numpy().__array__(dtype)  # type: ignore[call-overload]

    def tobytes(self) -> bytes:
        return self.numpy().tobytes()

    def tofile(self, file: IO[bytes]) -> None:
        file.write(self.numpy().reshape(-1).view(np.uint8).data)


def stored_tensor(tensor: Tensor, like: ir.Tensor, name: str) -> ir.Tensor:
    """Return a tensor of a graph with these values, which are a view of those of ``like``, and of its dtype."""
    return WidenedTensor(tensor, name) if isinstance(like, WidenedTensor) else TorchTensor(tensor, name)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Let zeros in float32 stand in for all parameters in half precision within the block, and convert buffers.

    Yields:
        The parameters as they are stored, by the address of the zeros that stand in for them; see `put_stored`.
    """
    halves = {id(parameter): parameter for parameter in model.parameters() if parameter.dtype in HALF}
    stand_ins = {key: _zeros(parameter) for key, parameter in halves.items()}
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in tables:
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.dtype in HALF:
                        replaced.append((tensors, name, tensor))
                        tensors[name] = stand_ins[id(tensor)] if id(tensor) in stand_ins else tensor.float()
        yield {stand_ins[key].data_ptr(): parameter.detach() for key, parameter in halves.items()}
    finally:
        for tensors, name, tensor in replaced:
            tensors[name] = tensor


def put_stored(graph: ir.Graph, stored: Mapping[int, Tensor]) -> None:
    """Replace the zeros in a traced graph by the weights that they stood in for."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.Tensor) and isinstance(tensor.raw, Tensor) and tensor.raw.data_ptr() in stored:
            value.const_value = WidenedTensor(stored[tensor.raw.data_ptr()], value.name)


def _zeros(parameter: Tensor) -> nn.Parameter:
    # NumPy asks the system for pages of zeros, which take no memory until they are written; torch.zeros writes them.
    return nn.Parameter(torch.from_numpy(np.zeros(parameter.shape, np.float32)), requires_grad=False)
