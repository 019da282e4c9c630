"""Find which weights of a quantised graph are still in floating point, and why.

A quantiser without a rule for a weight says nothing, and the file is larger and slower for it. So this module inspects
the finished graph: it searches it for the weights of the original graph, by name.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from converters.onnx.names import parameter_name

# Operators that pass a weight on.
_CARRIERS = {"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}

_WIDE = {ir.DataType.FLOAT, ir.DataType.DOUBLE}
_FLOATING = _WIDE | {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}

VECTORS = "norms and biases"
_REASONS = {
    VECTORS: "they have only one axis",
    "Conv": "ONNX Runtime's convolution is slower in int8 than in float32",
    "ConvTranspose": "ONNX Runtime's convolution is slower in int8 than in float32",
    "Gather": "too small, too narrow, or also read by another operator",
    "MatMul": "too narrow for blocks, not on the right, or also read by another operator",
    "Gemm": "too narrow for blocks, or of an unknown form",
    "FusedMatMul": "too narrow for blocks, or of an unknown form",
}


@dataclass(frozen=True)
class FloatWeights:
    """The floating-point weights that one kind of operator reads: numbers of tensors, of weights in them, of bytes,
    and why they are not quantised."""

    operator: str
    tensors: int
    weights: int
    bytes: int
    reason: str


@dataclass(frozen=True)
class QuantizedWeights:
    """How many weights of a graph were quantised.

    weights: the number of all weights in the original graph.
    left: those that are still in floating point, by operator, largest group first.
    """

    weights: int
    left: tuple[FloatWeights, ...]

    @property
    def share(self) -> float:
        """The share of weights that were quantised."""
        return 1 - sum(group.weights for group in self.left) / self.weights if self.weights else 1.0


def count_quantized(source: Path, quantized: Path) -> QuantizedWeights:
    """Compare a graph with the graph that was quantised from it. External weights are not read."""
    before, after = (onnx.load(path, load_external_data=False).graph for path in (source, quantized))
    names = {parameter_name(tensor.name) for tensor in before.initializer}
    floats = [
        tensor
        for tensor in after.initializer
        if ir.DataType(tensor.data_type) in _WIDE and parameter_name(tensor.name) in names
    ]
    readers = _readers(after)
    groups: dict[str, list[onnx.TensorProto]] = defaultdict(list)
    for tensor in floats:
        groups[VECTORS if len(tensor.dims) < 2 else readers.get(tensor.name, "nothing")].append(tensor)
    left = (
        FloatWeights(
            operator=operator,
            tensors=len(tensors),
            weights=sum(_numbers(tensor) for tensor in tensors),
            bytes=sum(_numbers(tensor) * ir.DataType(tensor.data_type).bitwidth // 8 for tensor in tensors),
            reason=_REASONS.get(operator, "there is no quantised form of this operator"),
        )
        for operator, tensors in groups.items()
    )
    total = sum(_numbers(tensor) for tensor in before.initializer if ir.DataType(tensor.data_type) in _FLOATING)
    return QuantizedWeights(total, tuple(sorted(left, key=lambda group: -group.weights)))


def _readers(graph: onnx.GraphProto) -> dict[str, str]:
    """Map each weight to the operator that reads it, skipping those that only pass it on."""
    origins: dict[str, str] = {}
    readers: dict[str, str] = {}
    for node in graph.node:
        for name in node.input:
            if node.op_type in _CARRIERS:
                origins[node.output[0]] = origins.get(name, name)
                break
            readers.setdefault(origins.get(name, name), node.op_type)
    return readers


def _numbers(tensor: onnx.TensorProto) -> int:
    """The number of entries of a tensor."""
    return math.prod(tensor.dims)
