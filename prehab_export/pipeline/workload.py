"""How large a run's work is: the operations of a forward pass, the rows that each selected layer sees, and its shapes.
Counted on the model without weights, with one batch of its data."""

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

# Tokens of an image where the model cannot be run without weights to count them: those of a ViT at 224 pixels.
USUAL_TOKENS = 197


@dataclass(frozen=True)
class Layer:
    """A selected layer: m×n, the rows that it sees of one sample, and the number of its input, which several share."""

    name: str
    m: int
    n: int
    rows: float
    input: int

    @property
    def kind(self) -> str:
        """Its place in every block: ``model.layers.*.mlp.up_proj``."""
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", self.name)


@dataclass(frozen=True)
class Workload:
    """flops: of one sample's forward pass through the dense model, padding included. activations: numbers that its
    operations give, answers: those of its output. parameters: of the model."""

    flops: float
    activations: float
    answers: float
    parameters: int
    layers: tuple[Layer, ...]

    @property
    def blocks(self) -> int:
        """How many blocks hold selected layers."""
        numbers = {tuple(re.findall(r"(?<=\.)\d+(?=\.)", layer.name))[:1] for layer in self.layers}
        return max(1, len(numbers))

    @property
    def inputs(self) -> dict[int, list[Layer]]:
        """The layers by the input that they share."""
        found: dict[int, list[Layer]] = {}
        for layer in self.layers:
            found.setdefault(layer.input, []).append(layer)
        return found

    @property
    def selected(self) -> int:
        return sum(layer.m * layer.n for layer in self.layers)


def workload(session: Session) -> Workload:
    """Counted on one batch of the calibration sample."""
    model = session.empty_model
    layers = session.layers(model)
    batch = next(iter(session.calibration.batches(min(session.config.data.batch_size, 32))))
    samples = sample_count(batch)
    count = sum(parameter.numel() for parameter in model.parameters())
    counted = _counted(model, layers, batch)
    if counted is None:
        tokens = batch["input_ids"].numel() if "input_ids" in batch else samples * USUAL_TOKENS
        matrices = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2)
        shapes = [(name, *dense_weight(layer).shape) for name, layer in layers.items()]
        rows = [Layer(name, m, n, tokens / samples, at) for at, (name, m, n) in enumerate(shapes)]
        activations = 3 * sum(layer.rows * layer.m for layer in rows)
        return Workload(2.0 * matrices * tokens / samples, activations, 0.0, count, tuple(rows))
    flops, numbers, answers, seen = counted
    found: list[Layer] = []
    for name, layer in layers.items():
        m, n = dense_weight(layer).shape
        rows_of, group = seen.get(name, (0.0, -1 - len(found)))
        found.append(Layer(name, m, n, rows_of / samples, group))
    return Workload(flops / samples, numbers / samples, answers / samples, count, tuple(found))


def _counted(
    model: nn.Module, layers: Mapping[str, DenseLinear], batch: Batch
) -> tuple[float, float, float, dict[str, tuple[float, int]]] | None:
    """Operations, numbers that they give, numbers of the output, and of each layer its rows and input, for a batch;
    None for a model that does not run without weights."""
    seen: dict[str, tuple[float, int]] = {}
    inputs: list[Any] = []  # kept, so that no other tensor takes the place of one that is gone

    def note(name: str, width: int) -> Any:
        def hook(_layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0]
            group = next((at for at, other in enumerate(inputs) if other is x), len(inputs))
            if group == len(inputs):
                inputs.append(x)
            before = seen.get(name, (0.0, group))
            seen[name] = before[0] + x.numel() / width, before[1]

        return hook

    handles = [
        layer.register_forward_pre_hook(note(name, dense_weight(layer).shape[1])) for name, layer in layers.items()
    ]
    # Masks would have to be looked into, which nothing without numbers can be.
    taken = {name: value.to("meta") for name, value in batch.items() if name in ("input_ids", "pixel_values")}
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter, _NumberCounter() as numbers:
            output = model(**taken)
    except Exception:  # of whatever kind: it is then counted from its parameters
        return None
    finally:
        for handle in handles:
            handle.remove()
    return float(counter.get_total_flops()), numbers.total, float(output.logits.numel()), seen


class _NumberCounter(TorchDispatchMode):
    """Counts the numbers that operations give, but for those that are only looked at in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not any(result.alias_info for result in func._schema.returns):
            self.total += sum(leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
        return output
