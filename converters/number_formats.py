"""Number formats, by the names that PyTorch and NumPy have for them, and what else they are called.

No library is imported here: the process that measures a model reads this, and must not grow by it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class NumberFormat:
    """bytes: of one number. header: the format's name in the header of a safetensors file. session: what ONNX Runtime
    calls a tensor of it; None where NumPy has no such format, so that no array of it can be fed.
    """

    bytes: int
    header: str
    session: str | None


NUMBER_FORMATS = {
    "float64": NumberFormat(8, "F64", "tensor(double)"),
    "float32": NumberFormat(4, "F32", "tensor(float)"),
    "bfloat16": NumberFormat(2, "BF16", None),
    "float16": NumberFormat(2, "F16", "tensor(float16)"),
    "int64": NumberFormat(8, "I64", "tensor(int64)"),
    "int32": NumberFormat(4, "I32", "tensor(int32)"),
    "bool": NumberFormat(1, "BOOL", "tensor(bool)"),
}
# Formats that the weights of models come in, and those that they are written and computed in.
SOURCE_FORMATS = ("float64", "float32", "bfloat16", "float16")
WEIGHT_FORMATS = ("float32", "bfloat16", "float16")

# The formats that a session's inputs and outputs have as arrays, by what ONNX Runtime calls their tensors.
ARRAY_FORMATS = {form.session: name for name, form in NUMBER_FORMATS.items() if form.session is not None}
