"""Multiply-adds of a kernel, computed from the tensor shapes that ONNX Runtime's profiler records."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

# Matrix products that run in float32 and in int8. All contract the last axis of their first input. MatMulNBits counts
# as int8, because the accuracy level that our graphs set for it computes in int8.
FLOAT_PRODUCTS = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
INT8_PRODUCTS = {
    "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "QLinearMatMul", "QGemm",
}  # fmt: skip
CONVOLUTIONS = {"Conv", "FusedConv", "NhwcFusedConv"}
INT8_CONVOLUTIONS = {"ConvInteger", "QLinearConv"}
INT8_OPERATORS = INT8_PRODUCTS | INT8_CONVOLUTIONS
ATTENTIONS = {"Attention", "MultiHeadAttention"}


def multiply_adds(op: str, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> int:
    """Return the multiply-adds of one kernel; 0 if it is neither a product, a convolution nor an attention.

    Args:
        inputs: shapes of its input tensors, without weights that ONNX Runtime has packed.
        outputs: shapes of its output tensors.

    >>> multiply_adds("MatMul", [[1, 10, 64]], [[1, 10, 32]])
    20480
    """
    if op in FLOAT_PRODUCTS | INT8_PRODUCTS:
        return prod(outputs[0]) * inputs[0][-1]
    if op in ATTENTIONS and len(inputs) > 2 and len(inputs[0]) == 4:
        # Query (B, H, S, d), key (B, H_kv, T, d), value (B, H_kv, T, d_v). With a cache, the output keys are longer.
        batch, heads, queries, width = inputs[0]
        keys = max(shape[2] for shape in [inputs[1], *outputs[1:2]])
        return batch * heads * queries * keys * (width + inputs[2][3])
    if op in ATTENTIONS and len(inputs) > 2 and len(inputs[0]) == 3:
        # Heads concatenated: query (B, S, H·d), key (B, T, H_kv·d), output (B, S, H·d_v).
        batch, queries, width = inputs[0]
        return batch * queries * inputs[1][1] * (width + outputs[0][2])
    if op in CONVOLUTIONS | INT8_CONVOLUTIONS:
        kernel = next(shape for shape in inputs[1:] if len(shape) > 2)  # int8 kernels also have scales and zero points
        return prod(outputs[0]) * prod(kernel[1:])
    return 0


def event_multiply_adds(event: Mapping[str, Any]) -> int:
    """Return the multiply-adds of the kernel that a profiler event describes.

    Args:
        event: the ``args`` of the event.
    """
    sides = (event["input_type_shape"], event["output_type_shape"])
    inputs, outputs = ([shape for tensor in side for shape in tensor.values()] for side in sides)
    return multiply_adds(event["op_name"], inputs, outputs)
