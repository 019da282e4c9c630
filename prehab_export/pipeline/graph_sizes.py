"""Estimates of the size of a model's graph, in float32 and in each quantisation mode."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from converters.onnx.modes import MODES

# Mode → bytes per number in a weight matrix and in an embedding table, including the scales of blocks of 32.
WIDTHS: Mapping[str, tuple[float, float]] = {
    "float32": (4.0, 4.0),
    "float16": (2.0, 2.0),
    "int8": (1.0, 1.05),
    "int8-tables4": (1.0, 0.65),
    "int8-static": (1.0, 1.05),
    "int8-blocks": (1.14, 1.05),
    "int4": (0.65, 0.65),
}
assert set(WIDTHS) == {"float32", *MODES}


@dataclass(frozen=True)
class ParameterCounts:
    """A model's parameters: in weight matrices, in embedding tables, and in all others (biases, norms, kernels)."""

    matrices: int
    tables: int
    others: int

    @classmethod
    def of(cls, model: nn.Module) -> "ParameterCounts":
        """Count the parameters of a model; a shared parameter counts once, as a table if it is one."""
        parameters = {id(weight): weight for weight in model.parameters()}
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        sizes = [0, 0, 0]
        for key, weight in parameters.items():
            sizes[1 if key in tables else 0 if weight.dim() == 2 else 2] += weight.numel()
        return cls(*sizes)

    def bytes(self, mode: str, removed: int = 0) -> int:
        """Return the bytes of a graph's weights.

        Args:
            mode: ``float32`` or a quantisation mode.
            removed: parameters that compression removes from the matrices.
        """
        matrix_width, table_width = WIDTHS[mode]
        other_width = 2.0 if mode == "float16" else 4.0
        matrices, tables = matrix_width * (self.matrices - removed), table_width * self.tables
        return round(matrices + tables + other_width * self.others)
