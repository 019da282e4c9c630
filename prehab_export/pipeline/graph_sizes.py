"""How many bytes a model's graph will have, in float32 and in each kind of quantisation."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from converters.onnx.modes import MODES

# Mode → bytes of a number in a product's matrix, and of one in an embedding table: scales of blocks of 32 are in them.
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
class Numbers:
    """The numbers of a model: in matrices of products, in embedding tables, and the rest (biases, norms, kernels)."""

    matrices: int
    tables: int
    rest: int

    @classmethod
    def of(cls, model: nn.Module) -> "Numbers":
        parameters = {id(weight): weight for weight in model.parameters()}
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        sizes = [0, 0, 0]
        for key, weight in parameters.items():
            sizes[1 if key in tables else 0 if weight.dim() == 2 else 2] += weight.numel()
        return cls(*sizes)

    def bytes(self, mode: str, removed: int = 0) -> int:
        """Of the graph's weights, without so many numbers of the matrices."""
        matrices, tables = WIDTHS[mode]
        rest = 2.0 if mode == "float16" else 4.0
        return round(matrices * (self.matrices - removed) + tables * self.tables + rest * self.rest)
