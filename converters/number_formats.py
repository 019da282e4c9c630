"""Define number formats by their PyTorch and NumPy names, with their names elsewhere.

No library is imported here, because the process that measures a model's memory imports this module.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class NumberFormat:
    """One number format.

    bytes: the size of one number.
    header: the format's name in the header of a safetensors file.
    session: ONNX Runtime's name for a tensor of this format; None if NumPy lacks the format, so no array can be fed.
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
# Formats in which models are read, and formats in which weights are written and computed.
SOURCE_FORMATS = ("float64", "float32", "bfloat16", "float16")
WEIGHT_FORMATS = ("float32", "bfloat16", "float16")

# ONNX Runtime's name for a tensor → the format of the array that a session takes or returns.
ARRAY_FORMATS = {form.session: name for name, form in NUMBER_FORMATS.items() if form.session is not None}
