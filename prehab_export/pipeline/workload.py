"""The size of a run's work: the operations of a forward pass, and each selected layer's shape and rows.

It is counted on the model without weights, with one batch of data.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from converters.lowrank import DenseLinear, dense_weight
from prehab_export.inputs import Batch, sample_count
from prehab_export.pipeline.session import Session

# Tokens of an image, assumed if the model cannot run without weights: those of a ViT at 224 pixels.
USUAL_TOKENS = 197


@dataclass(frozen=True)
class Layer:
    """A selected layer of shape m×n.

    rows: the rows that it processes for one sample.
    input: the index of its input, which several layers may share.
    """

    name: str
    m: int
    n: int
    rows: float
    input: int

    @property
    def kind(self) -> str:
        """The layer's name without block numbers: ``model.layers.*.mlp.up_proj``."""
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", self.name)


@dataclass(frozen=True)
class Workload:
    """The size of a dense model and of one sample's forward pass through it, padding included.

    flops: floating-point operations of the forward pass.
    activations: numbers that its operations produce.
    outputs: numbers in its output.
    parameters: the parameters of the model.
    layers: the selected layers.
    """

    flops: float
    activations: float
    outputs: float
    parameters: int
    layers: tuple[Layer, ...]

    @property
    def blocks(self) -> int:
        """The number of blocks that hold selected layers, at least 1."""
        numbers = {tuple(re.findall(r"(?<=\.)\d+(?=\.)", layer.name))[:1] for layer in self.layers}
        return max(1, len(numbers))

    @property
    def inputs(self) -> dict[int, list[Layer]]:
        """Input index → the layers that share it."""
        groups: dict[int, list[Layer]] = {}
        for layer in self.layers:
            groups.setdefault(layer.input, []).append(layer)
        return groups

    @property
    def selected(self) -> int:
        """The parameters of the selected layers."""
        return sum(layer.m * layer.n for layer in self.layers)


def count_workload(session: Session) -> Workload:
    """Count the workload on one batch of the calibration samples."""
    model = session.empty_model
    layers = session.layers(model)
    batch = next(iter(session.calibration.batches(min(session.config.data.batch_size, 32))))
    samples = sample_count(batch)
    count = sum(parameter.numel() for parameter in model.parameters())
    counts = _count_operations(model, layers, batch)
    if counts is None:
        tokens = batch["input_ids"].numel() if "input_ids" in batch else samples * USUAL_TOKENS
        matrices = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2)
        shapes = [(name, *dense_weight(layer).shape) for name, layer in layers.items()]
        estimates = [Layer(name, m, n, tokens / samples, index) for index, (name, m, n) in enumerate(shapes)]
        activations = 3 * sum(layer.rows * layer.m for layer in estimates)
        return Workload(2.0 * matrices * tokens / samples, activations, 0.0, count, tuple(estimates))
    flops, numbers, outputs, layer_inputs = counts
    selected: list[Layer] = []
    for name, layer in layers.items():
        m, n = dense_weight(layer).shape
        rows, index = layer_inputs.get(name, (0.0, -1 - len(selected)))  # negative for a layer that did not run
        selected.append(Layer(name, m, n, rows / samples, index))
    return Workload(flops / samples, numbers / samples, outputs / samples, count, tuple(selected))


def _count_operations(
    model: nn.Module, layers: Mapping[str, DenseLinear], batch: Batch
) -> tuple[float, float, float, dict[str, tuple[float, int]]] | None:
    """Run a batch through a model without weights.

    Returns:
        The batch's operations, the numbers that they produce, the numbers in the output, and layer name → (rows, index
        of the input); None if the model does not run without weights.
    """
    layer_inputs: dict[str, tuple[float, int]] = {}
    inputs: list[Any] = []  # references keep the tensors alive, so that no later tensor has the identity of an old one

    def make_hook(name: str, width: int) -> Any:
        def hook(_layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0]
            index = next((i for i, other in enumerate(inputs) if other is x), len(inputs))
            if index == len(inputs):
                inputs.append(x)
            rows, first_index = layer_inputs.get(name, (0.0, index))
            layer_inputs[name] = rows + x.numel() / width, first_index

        return hook

    handles = [
        layer.register_forward_pre_hook(make_hook(name, dense_weight(layer).shape[1])) for name, layer in layers.items()
    ]
    # Models read the values of a mask, and meta tensors have none.
    arguments = {name: value.to("meta") for name, value in batch.items() if name in ("input_ids", "pixel_values")}
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter, _NumberCounter() as numbers:
            output = model(**arguments)
    except Exception:  # a model's own code may raise anything; the caller then estimates from the parameters
        return None
    finally:
        for handle in handles:
            handle.remove()
    return float(counter.get_total_flops()), numbers.total, float(output.logits.numel()), layer_inputs


class _NumberCounter(TorchDispatchMode):
    """Counts the numbers that operations produce; views produce none."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not any(result.alias_info for result in func._schema.returns):
            self.total += sum(leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
        return output
