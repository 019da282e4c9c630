"""What a quantised graph still holds in floating point, and why: judged by the finished graph, not by what was meant.

A quantiser that finds no rule for a weight says nothing; the file is larger and slower for it. So the weights of the
graph that was quantised are looked for in the one that came of it, under the same names.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from converters.onnx.names import parameter_name

# Operators that hand a weight on.
_CARRIERS = {"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}

_WIDE = {ir.DataType.FLOAT, ir.DataType.DOUBLE}
_FLOATING = _WIDE | {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}

VECTORS = "norms and biases"
_REASONS = {
    VECTORS: "they have one axis only",
    "Conv": "ONNX Runtime's convolution is slower in int8 than in float32",
    "ConvTranspose": "ONNX Runtime's convolution is slower in int8 than in float32",
    "Gather": "too small, too narrow, or read by something else too",
    "MatMul": "too narrow for blocks, not on the right, or read by something else too",
    "Gemm": "too narrow for blocks, or of a form that is not known",
    "FusedMatMul": "too narrow for blocks, or of a form that is not known",
}


@dataclass(frozen=True)
class Left:
    """Weights that one kind of operator reads in floating point: how many tensors, numbers in them, and bytes."""

    operator: str
    tensors: int
    weights: int
    bytes: int
    reason: str


@dataclass(frozen=True)
class QuantizedWeights:
    """``weights``: numbers in the weights of the graph that was quantised; ``left``: those that were not, the most
    first."""

    weights: int
    left: tuple[Left, ...]

    @property
    def share(self) -> float:
        """Of the weights that were quantised."""
        return 1 - sum(left.weights for left in self.left) / self.weights if self.weights else 1.0


def count_quantized(source: Path, quantized: Path) -> QuantizedWeights:
    """Compare the weights of two graphs, of which the second was made from the first. Weights are not read."""
    before, after = (onnx.load(path, load_external_data=False).graph for path in (source, quantized))
    names = {parameter_name(tensor.name) for tensor in before.initializer}
    kept = [
        tensor
        for tensor in after.initializer
        if ir.DataType(tensor.data_type) in _WIDE and parameter_name(tensor.name) in names
    ]
    readers = _readers(after)
    groups: dict[str, list[onnx.TensorProto]] = defaultdict(list)
    for tensor in kept:
        groups[VECTORS if len(tensor.dims) < 2 else readers.get(tensor.name, "nothing")].append(tensor)
    left = (
        Left(
            operator=operator,
            tensors=len(tensors),
            weights=sum(_numbers(tensor) for tensor in tensors),
            bytes=sum(_numbers(tensor) * ir.DataType(tensor.data_type).bitwidth // 8 for tensor in tensors),
            reason=_REASONS.get(operator, "there is no quantised form of it here"),
        )
        for operator, tensors in groups.items()
    )
    total = sum(_numbers(tensor) for tensor in before.initializer if ir.DataType(tensor.data_type) in _FLOATING)
    return QuantizedWeights(total, tuple(sorted(left, key=lambda group: -group.weights)))


def _readers(graph: onnx.GraphProto) -> dict[str, str]:
    """Weight → the operator that reads it, behind those that only hand it on."""
    handed: dict[str, str] = {}
    readers: dict[str, str] = {}
    for node in graph.node:
        for name in node.input:
            if node.op_type in _CARRIERS:
                handed[node.output[0]] = handed.get(name, name)
                break
            readers.setdefault(handed.get(name, name), node.op_type)
    return readers


def _numbers(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims)
