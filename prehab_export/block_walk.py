"""Two models side by side, one repeated block at a time: the dense one, and the one that is being compressed.

Whatever works block by block (drift-anchored truncation, block-wise refinement) needs the same three things: which
layers lie in which block, what a block is called with on the calibration sample, and what flows into a layer in both
models. A block is run by itself, so that a walk over the whole model costs a few forward passes however deep it is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from prehab_export.devices import device_of, moved
from prehab_export.tasks import Batch, Task

# What one block is called with besides its hidden states: positional and keyword arguments.
Call = tuple[tuple[Any, ...], dict[str, Any]]


class NotAChain(Exception):
    """The model's blocks do not hand their output straight to the next one, once a pass; the text says where."""


@dataclass(frozen=True)
class Block:
    """One entry of the model's list of blocks, and the targeted layers inside it in the model's order."""

    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Seen:
    """What one pass through a block showed: the input of each watched layer, and, for layers whose output is
    added to a residual stream, what it was added to."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    residuals: dict[str, Tensor] = field(default_factory=dict)


def find_blocks(model: nn.Module, layers: Iterable[str]) -> list[Block]:
    """The blocks that hold the named layers; a layer outside every ``nn.ModuleList`` is in none."""
    found: dict[str, list[str]] = {}
    for name in layers:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
                found.setdefault(".".join(parts[: depth + 1]), []).append(name)
                break
    return [Block(name, tuple(inside)) for name, inside in found.items()]


class BlockWalk:
    """Hidden states of both models in front of the current block, for every batch of the sample.

    They lie on the models' device, in the dtypes that the models hand from block to block under the task's precision.

    Raises (when made):
        NotAChain: the blocks cannot be run one by one.
    """

    def __init__(
        self, dense: nn.Module, student: nn.Module, task: Task, batches: Iterable[Batch], blocks: Sequence[Block]
    ) -> None:
        self.dense, self.student, self.task = dense, student, task
        self.masks: list[Tensor | None] = []
        self.calls: dict[str, list[Call]] = {block.name: [] for block in blocks}
        self.dense_states: list[Tensor] = []
        self.student_states: list[Tensor] = []
        #: Layers of each block in the order in which they run.
        self.order: dict[str, list[str]] = {block.name: [] for block in blocks}
        device = device_of(dense)
        for batch in (moved(batch, device) for batch in batches):
            self.masks.append(task.token_mask(batch))
            if len(self.masks) == 1:
                self._note_order(task, batch, blocks)
            self.dense_states.append(_record(dense, task, batch, self.calls))
            self.student_states.append(_record(student, task, batch, None, blocks[0].name))

    def _note_order(self, task: Task, batch: Batch, blocks: Sequence[Block]) -> None:
        def hook(block: str, name: str) -> Callable:
            return lambda _layer, _args: self.order[block].append(name)

        with _hooks() as hooks:
            for block in blocks:
                for name in block.layers:
                    hooks.append(self.dense.get_submodule(name).register_forward_pre_hook(hook(block.name, name)))
            task.logits(self.dense, {key: value[:1] for key, value in batch.items()})
        self.order = {block: list(dict.fromkeys(names)) for block, names in self.order.items()}

    def observe(self, block: Block, names: Sequence[str]) -> Iterator[tuple[Seen, Seen, Tensor | None, int]]:
        """(in the dense model, in the student, token mask, positions) for every batch: the inputs of the named
        layers, which share one input, and their residuals."""
        stop_early = False
        for number, mask in enumerate(self.masks):
            with self.task.running(self.dense):
                seen = [
                    _watch(model.get_submodule(block.name), block.name, names, states[number], call, stop_early)
                    for model, states in ((self.dense, self.dense_states), (self.student, self.student_states))
                    for call in (self.calls[block.name][number],)
                ]
            # A layer that writes to the residual stream shows it only after it has run.
            stop_early = not seen[0].residuals
            yield seen[0], seen[1], mask, self.dense_states[number][..., 0].numel()

    def targets(self, block: Block) -> list[Tensor]:
        """The dense block's output on the dense model's states, a batch at a time."""
        inner = self.dense.get_submodule(block.name)
        pairs = zip(self.dense_states, self.calls[block.name], strict=True)
        return [self.run(inner, states, call) for states, call in pairs]

    def advance(self, block: Block) -> None:
        """Take both models' states through the block as it now is."""
        for model, states in ((self.dense, self.dense_states), (self.student, self.student_states)):
            inner = model.get_submodule(block.name)
            for number, call in enumerate(self.calls[block.name]):
                states[number] = self.run(inner, states[number], call)

    def run(self, block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
        """Hidden states out of the block."""
        with self.task.running(block):
            return hidden_of(block(hidden, *call[0], **call[1]))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns."""
    return output[0] if isinstance(output, tuple) else output


def _record(
    model: nn.Module, task: Task, batch: Batch, calls: dict[str, list[Call]] | None, first: str | None = None
) -> Tensor:
    """Run one batch; note what every block is called with, and return what enters the first.

    With ``first`` only that is wanted and the pass ends there.
    """
    names = list(calls) if calls is not None else [first or ""]
    entered: list[Tensor] = []
    left: list[Tensor] = []

    def before(name: str) -> Callable:
        def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            if left and hidden is not left[-1]:
                raise NotAChain(f"{name} does not start from the output of the block before it")
            entered.append(hidden)
            if calls is None:
                raise _Enough
            calls[name].append((args[1:], rest))

        return hook

    def after(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        left.append(hidden_of(output))

    with _hooks() as hooks:
        for name in names:
            block = model.get_submodule(name)
            hooks.append(block.register_forward_pre_hook(before(name), with_kwargs=True))
            hooks.append(block.register_forward_hook(after))
        with suppress(_Enough):
            task.logits(model, batch)
    if calls is not None and len(entered) != len(names):
        raise NotAChain(f"{len(names)} blocks were run {len(entered)} times in one pass")
    return entered[0]


def _watch(block: nn.Module, prefix: str, names: Sequence[str], hidden: Tensor, call: Call, stop_early: bool) -> Seen:
    seen = Seen()
    adds = _Adds(seen.residuals)

    def before(name: str) -> Callable:
        def hook(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.inputs[name] = args[0]
            if stop_early and len(seen.inputs) == len(names):
                raise _Enough

        return hook

    def after(name: str) -> Callable:
        def hook(_layer: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            adds.watch(name, output)

        return hook

    with _hooks() as hooks:
        for name in names:
            layer = block.get_submodule(name.removeprefix(prefix + "."))
            hooks.append(layer.register_forward_pre_hook(before(name)))
            hooks.append(layer.register_forward_hook(after(name)))
        with suppress(_Enough), adds:
            block(hidden, *call[0], **call[1])
    return seen


class _Enough(Exception):
    """Ends a forward pass that has shown what was wanted."""


class _Adds(TorchDispatchMode):
    """Notes what a watched tensor is added to: the residual stream, whatever the model calls it.

    What is itself made from the watched tensor is no stream (``y + 0.04 y³`` in a GELU), so that is followed too.
    """

    def __init__(self, residuals: dict[str, Tensor]) -> None:
        super().__init__()
        self.residuals = residuals
        self.outputs: dict[str, int] = {}  # address of each watched tensor
        self.made_from: dict[int, set[str]] = {}  # by address of the data: names of the watched tensors it depends on
        self.alive: list[Tensor] = []  # or an address could be used twice

    def watch(self, name: str, output: Tensor) -> None:
        self.outputs[name] = output.data_ptr()
        self._mark(output, {name})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        sources = [self.made_from.get(leaf.data_ptr(), set()) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if func in _ADDITIONS and isinstance(args[1], Tensor):
            for one, other in ((args[0], args[1]), (args[1], args[0])):
                for name in self.made_from.get(one.data_ptr(), set()) - self.made_from.get(other.data_ptr(), set()):
                    if one.data_ptr() == self.outputs[name] and one.shape == other.shape and name not in self.residuals:
                        # Added in place, the stream would not be what it was by the time it is looked at.
                        self.residuals[name] = other.clone() if func is torch.ops.aten.add_.Tensor else other
        result = func(*args, **(kwargs or {}))
        if names := set().union(*sources):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._mark(leaf, names)
        return result

    def _mark(self, tensor: Tensor, names: set[str]) -> None:
        self.made_from[tensor.data_ptr()] = self.made_from.get(tensor.data_ptr(), set()) | names
        self.alive.append(tensor)


_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@contextmanager
def _hooks() -> Iterator[list[RemovableHandle]]:
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
