"""Multiply-adds of a kernel, from the shapes that ONNX Runtime's profiler notes."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

# Products that run in float32, and in int8 (weights in blocks too, at the accuracy level of our graphs); all contract
# the last axis of their first input.
FLOAT_PRODUCTS = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
INT8_PRODUCTS = {
    "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "QLinearMatMul", "QGemm",
}  # fmt: skip
CONVOLUTIONS = {"Conv", "FusedConv", "NhwcFusedConv"}
INT8_CONVOLUTIONS = {"ConvInteger", "QLinearConv"}
INT8_OPERATORS = INT8_PRODUCTS | INT8_CONVOLUTIONS
ATTENTIONS = {"Attention", "MultiHeadAttention"}


def multiply_adds(op: str, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> int:
    """Multiply-adds of one kernel; 0 for what is no product.

    Args:
        inputs, outputs: shapes of its tensors. Weights that were packed beforehand are not among them.

    >>> multiply_adds("MatMul", [[1, 10, 64]], [[1, 10, 32]])
    20480
    """
    if op in FLOAT_PRODUCTS | INT8_PRODUCTS:
        return prod(outputs[0]) * inputs[0][-1]
    if op in ATTENTIONS and len(inputs) > 2 and len(inputs[0]) == 4:
        # query (B, H, S, d), key (B, H_kv, T, d), value (B, H_kv, T, d_v); a cache makes keys longer than the input.
        batch, heads, queries, width = inputs[0]
        keys = max(shape[2] for shape in [inputs[1], *outputs[1:2]])
        return batch * heads * queries * keys * (width + inputs[2][3])
    if op in ATTENTIONS and len(inputs) > 2 and len(inputs[0]) == 3:
        # Heads side by side: query (B, S, H·d), key (B, T, H_kv·d), the answer (B, S, H·d_v).
        batch, queries, width = inputs[0]
        return batch * queries * inputs[1][1] * (width + outputs[0][2])
    if op in CONVOLUTIONS | INT8_CONVOLUTIONS:
        kernel = next(shape for shape in inputs[1:] if len(shape) > 2)  # among scales and zero points, if in int8
        return prod(outputs[0]) * prod(kernel[1:])
    return 0


def of_event(event: Mapping[str, Any]) -> int:
    """Multiply-adds of one kernel event of a profile."""
    sides = (event["input_type_shape"], event["output_type_shape"])
    inputs, outputs = ([shape for tensor in side for shape in tensor.values()] for side in sides)
    return multiply_adds(event["op_name"], inputs, outputs)
