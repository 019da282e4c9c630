"""Records forward passes: the arguments of blocks, the inputs of layers and the residual streams they write to."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from prehab_export.compression.block_calls import CONSTANTS, Call, Link, copy_argument, flatten_arguments, map_arguments
from prehab_export.compression.block_stubs import BlockStubs, OutputForm
from prehab_export.compression.blocks import LayerRun, NotAChain
from prehab_export.compression.dataflow import MarkedTensors, TokenRows, tensors_in
from prehab_export.compression.replaced_forwards import replaced_forwards
from prehab_export.compression.token_rows import token_rows
from prehab_export.inputs import Batch, Task


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states in a block's output, which are its first tensor.

    Raises:
        NotAChain: the output has no tensor.
    """
    first = output if isinstance(output, Tensor) else next(tensors_in(output), None)
    if first is None:
        raise NotAChain(f"a block returns a {type(output).__name__} without a tensor in it")
    return first


def numbers_in_order(hidden: Tensor) -> Tensor:
    """Number the rows of hidden states in order, for states whose tokens could not be tracked.

    The states are B×…×d, or B×d×h×w from convolutions; the numbers (int32) have the same shape.
    """
    shape = hidden[..., 0].shape if hidden.dim() != 4 else (hidden.shape[0], 1, *hidden.shape[2:])
    count = torch.Size(shape).numel()
    numbers = torch.arange(count, dtype=torch.int32, device=hidden.device).reshape(shape)
    return (numbers if hidden.dim() == 4 else numbers[..., None]).expand(hidden.shape)


@dataclass
class Recording:
    """A record of one forward pass.

    calls: block → the arguments of its call.
    entered: the hidden states that entered the first block or, in a trial, every block.
    outputs: in a trial, block → the leaves of its output.
    forms: in a trial, block → the form of its output (see ``OutputForm.of``).
    numbers: token numbers of the states that entered the first block; None if unknown.
    logits: the model's logits; None if the pass was stopped.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    entered: list[Tensor] = field(default_factory=list)
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    forms: dict[str, OutputForm | None] = field(default_factory=dict)
    numbers: Tensor | None = None
    logits: Tensor | None = None


def record_pass(
    model: nn.Module,
    task: Task,
    batch: Batch,
    names: Sequence[str],
    *,
    stop_early: bool = False,
    trial: bool = False,
    stubs: BlockStubs | None = None,
) -> Recording:
    """Run one batch and record the call of every block.

    Args:
        names: names of the blocks.
        stop_early: stop before the first block.
        trial: also record what enters and leaves each block, and check that its arguments do not depend on earlier
            blocks in a way that cannot be reproduced.
        stubs: run these in place of the blocks, and stop at the last one.

    Raises:
        NotAChain: the blocks cannot be run one by one.
    """
    recording, memo = Recording(), dict[int, Any]()
    runs: list[str] = []
    block_outputs: list[Tensor] = []
    links: dict[int, Link] = {}
    alive: list[Any] = []  # keeps outputs alive, so that no id() is used twice
    versions: list[tuple[Tensor, int]] = []
    marked = MarkedTensors()
    mask = task.token_mask(batch)
    is_text = next(iter(batch.values())).dim() == 2
    rows = token_rows(batch, mask) if is_text and not stop_early and not trial else None

    def stored(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) in links:
                return links[id(value)]
            if trial and marked.is_marked(value):
                raise NotAChain(f"{name} is also given a value computed from the output of an earlier block")
            if trial:
                versions.append((value, value._version))
        elif trial and id(value) not in memo and any(marked.is_marked(leaf) for leaf in tensors_in(value)):
            raise NotAChain(f"{name} is also given a value computed from the output of an earlier block")
        return copy_argument(value, memo)

    def before(name: str) -> Callable:
        def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest, keyword = dict(kwargs), None
            if not args:
                keyword = _keyword_of(rest, block_outputs)
                if keyword is None:
                    raise NotAChain(f"{name} is called without hidden states")
            hidden = args[0] if keyword is None else rest.pop(keyword)
            if block_outputs and hidden is not block_outputs[-1]:
                raise NotAChain(f"{name} does not start from the output of the previous block")
            if not runs or trial:
                recording.entered.append(hidden.clone())
            if not runs and rows is not None:
                recording.numbers = rows.numbers(hidden)
            runs.append(name)
            if stop_early:
                raise _StopForward
            versions.clear()
            others, named = map_arguments(lambda value: stored(name, value), (args[1:], rest))
            values = flatten_arguments((others, named))
            mutable = any(not isinstance(value, (Tensor, Link, *CONSTANTS)) for value in values)
            recording.calls[name] = Call(others, named, keyword, mutable)
            if stubs is not None and len(runs) == len(names):
                raise _StopForward

        return hook

    def after(name: str) -> Callable:
        def hook(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if any(value._version != version for value, version in versions):
                raise NotAChain(f"{name} changes its arguments in place")
            block_outputs.append(hidden_of(output))
            leaves = tree_leaves(output)
            alive.append(output)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if trial:
                marked.mark(*tensors)
                recording.outputs[name] = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                recording.forms[name] = OutputForm.of(output)
            for index, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    links.setdefault(id(leaf), Link(name, index))

        return hook

    standing_in = nullcontext() if stubs is None else stubs.standing_in(model)
    with temporary_hooks() as hooks, marked if trial else rows or nullcontext(), standing_in:
        for name in names:
            block = model.get_submodule(name)
            hooks.append(block.register_forward_pre_hook(before(name), with_kwargs=True))
            hooks.append(block.register_forward_hook(after(name)))
        with suppress(_StopForward):
            recording.logits = task.logits(model, batch)
    if len(runs) != len(names):
        raise NotAChain(f"{len(names)} blocks were run {len(runs)} times in one forward pass")
    return recording


def _keyword_of(kwargs: Mapping[str, Any], block_outputs: Sequence[Tensor]) -> str | None:
    """Return the keyword under which a block gets its hidden states."""
    chained = [name for name, value in kwargs.items() if block_outputs and value is block_outputs[-1]]
    usual = [name for name in ("hidden_states", "x", "input", "hidden_state") if name in kwargs]
    return next(iter(chained or usual), None)


def observe_layers(
    groups: Sequence[Mapping[str, nn.Module]],
    rows: TokenRows,
    run: Callable[[], object],
    *,
    writers: Collection[str] | None = None,
) -> list[list[LayerRun]]:
    """Record layers during ``run``: for each group, one record for each time that its first layer runs.

    Args:
        groups: layers by name; those of one group read the same input.
        writers: stop as soon as every input is known, and the residual stream of each of these layers. By default
            nothing is stopped.

    A single writer is not computed: the pass ends where its output is added, and what it is added to does not depend
    on it.
    """
    records: list[list[LayerRun]] = [[] for _ in groups]
    additions = _Additions(lambda: stop_if_known())

    def stop_if_known() -> None:
        if writers is None or not all(records):
            return
        if set(writers) <= {name for runs in records for record in runs for name in record.residuals}:
            raise _StopForward

    def before(runs: list[LayerRun]) -> Callable:
        def hook(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            # The block may later change its input in place.
            runs.append(LayerRun(x.shape, x.clone(), numbers=rows.rows(x), from_tokens=rows.is_marked(x)))
            stop_if_known()

        return hook

    def after(name: str, runs: list[LayerRun]) -> Callable:
        def hook(_layer: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            if runs:
                additions.watch(name, output, runs[-1])

        return hook

    with temporary_hooks() as hooks:
        for layers, runs in zip(groups, records, strict=True):
            leader = next(iter(layers.values()))
            hooks.append(leader.register_forward_pre_hook(before(runs)))
            for name, layer in layers.items():
                hooks.append(layer.register_forward_hook(after(name, runs)))
        with suppress(_StopForward), _giving_zeros(groups, writers), rows, additions:
            run()
    return records


def _giving_zeros(
    groups: Sequence[Mapping[str, nn.Module]], writers: Collection[str] | None
) -> AbstractContextManager[None]:
    """Within the context, the only writer among these layers gives zeros; if there are more, all run."""
    if writers is None or len(writers) != 1:
        return nullcontext()

    def zeros(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        features = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        assert isinstance(features, int)
        return lambda x: x.new_zeros(*x.shape[:-1], features)

    layers = [layer for group in groups for name, layer in group.items() if name in writers]
    return replaced_forwards({layer: zeros(layer) for layer in layers})


class _StopForward(Exception):
    """Ends a forward pass once everything needed is recorded."""


class _Additions(TorchDispatchMode):
    """Records what a watched tensor is added to: the residual stream, whatever the model calls it.

    A tensor computed from the watched one is not a residual stream (``y + 0.04 y³`` in a GELU), so the mode also tracks
    what is computed from it.
    """

    def __init__(self, found: Callable[[], None]) -> None:
        """
        Args:
            found: called whenever a residual stream is recorded.
        """
        super().__init__()
        self.found = found
        self.watched: dict[str, tuple[Tensor, LayerRun]] = {}
        self.sources: dict[int, set[str]] = {}  # address of a tensor's data → names of the watched tensors behind it
        self.alive: list[Tensor] = []  # keeps tensors alive, so that no address is used twice

    def watch(self, name: str, output: Tensor, record: LayerRun) -> None:
        """Watch a layer's output, and record under its name what it is added to."""
        self.watched[name] = (output, record)
        self._mark(output, {name})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        sources = [self.sources.get(leaf.data_ptr(), set()) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if func in _ADDITIONS and isinstance(args[1], Tensor):
            for one, other in ((args[0], args[1]), (args[1], args[0])):
                for name in self.sources.get(one.data_ptr(), set()) - self.sources.get(other.data_ptr(), set()):
                    output, record = self.watched[name]
                    if name in record.residuals or one.shape != other.shape or not _is_all_of(one, output):
                        continue
                    # An addition in place overwrites one of the two, so both are copied first.
                    in_place = func is torch.ops.aten.add_.Tensor
                    stream = other.clone() if in_place else other
                    record.residuals[name] = _laid_out_like(output, one, stream)
                    record.outputs[name] = output.clone() if in_place else output
                    self.found()
        result = func(*args, **(kwargs or {}))
        if names := set().union(*sources):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._mark(leaf, names)
        return result

    def _mark(self, tensor: Tensor, names: set[str]) -> None:
        self.sources[tensor.data_ptr()] = self.sources.get(tensor.data_ptr(), set()) | names
        self.alive.append(tensor)


def _is_all_of(view: Tensor, whole: Tensor) -> bool:
    """Return whether ``view`` shows all of the memory of ``whole``, in whatever order of axes."""
    return view.data_ptr() == whole.data_ptr() and view.numel() == whole.numel() and view.dtype == whole.dtype


def _laid_out_like(output: Tensor, view: Tensor, other: Tensor) -> Tensor:
    """Return ``other``, which is added to a view of a layer's output, in the shape and layout of the output itself.

    Convolutional networks add B×d×h×w, while their linear layers give B×h×w×d.
    """
    if output.shape == view.shape and output.stride() == view.stride():
        return other
    buffer = torch.empty_strided(view.shape, view.stride(), dtype=other.dtype, device=other.device)
    return buffer.copy_(other).as_strided(output.shape, output.stride())


_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@contextmanager
def temporary_hooks() -> Iterator[list[RemovableHandle]]:
    """Give a list to append hook handles to; all of them are removed at the end of the context."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
