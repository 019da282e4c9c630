"""One pass of a model, written down: what its blocks were given, what its layers read and what they wrote to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from prehab_export.compression.block_calls import CONSTANTS, Call, Link, copied, flat, map_arguments
from prehab_export.compression.blocks import NotAChain, Seen
from prehab_export.compression.dataflow import MadeFrom, TokenRows, tensors_in
from prehab_export.compression.token_rows import token_rows
from prehab_export.inputs import Batch, Task


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: the first tensor of it.

    Raises:
        NotAChain: there is none.
    """
    first = output if isinstance(output, Tensor) else next(tensors_in(output), None)
    if first is None:
        raise NotAChain(f"a block returns a {type(output).__name__} without a tensor in it")
    return first


def as_they_stand(hidden: Tensor) -> Tensor:
    """Numbers for hidden states (B×…×d, or B×d×h×w as convolutions have them) whose tokens could not be followed."""
    spots = hidden[..., 0].shape if hidden.dim() != 4 else (hidden.shape[0], 1, *hidden.shape[2:])
    count = torch.Size(spots).numel()
    numbers = torch.arange(count, dtype=torch.int32, device=hidden.device).reshape(spots)
    return (numbers if hidden.dim() == 4 else numbers[..., None]).expand(hidden.shape)


@dataclass
class Recording:
    """One pass through the model: what entered each block (of all but the first only in a trial), its call, and what
    it gave (in a trial). numbers: of the rows of what entered the first block."""

    calls: dict[str, Call] = field(default_factory=dict)
    entered: list[Tensor] = field(default_factory=list)
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    numbers: Tensor | None = None


def recorded(
    model: nn.Module,
    task: Task,
    batch: Batch,
    names: Sequence[str],
    *,
    stop_early: bool = False,
    try_out: bool = False,
) -> Recording:
    """Run one batch and note what every block is called with.

    Args:
        stop_early: end in front of the first block.
        try_out: keep what enters and leaves each block, and look at what else of it depends on earlier blocks.
    """
    recording, memo = Recording(), dict[int, Any]()
    runs: list[str] = []
    left: list[Tensor] = []
    produced: dict[int, Link] = {}
    alive: list[Any] = []  # or an identity could be used twice
    versions: list[tuple[Tensor, int]] = []
    made = MadeFrom()
    mask = task.token_mask(batch)
    of_text = next(iter(batch.values())).dim() == 2
    rows = token_rows(batch, mask) if of_text and not stop_early and not try_out else None

    def noted(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) in produced:
                return produced[id(value)]
            if try_out and made.knows(value):
                raise NotAChain(f"{name} is also given something made from the output of a block before it")
            if try_out:
                versions.append((value, value._version))
        elif try_out and id(value) not in memo and any(made.knows(leaf) for leaf in tensors_in(value)):
            raise NotAChain(f"{name} is also given something made from the output of a block before it")
        return copied(value, memo)

    def before(name: str) -> Callable:
        def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest, keyword = dict(kwargs), None
            if not args:
                keyword = _keyword_of(rest, left)
                if keyword is None:
                    raise NotAChain(f"{name} is called without hidden states")
            hidden = args[0] if keyword is None else rest.pop(keyword)
            if left and hidden is not left[-1]:
                raise NotAChain(f"{name} does not start from the output of the block before it")
            if not runs or try_out:
                recording.entered.append(hidden.clone())
            if not runs and rows is not None:
                recording.numbers = rows.numbers(hidden)
            runs.append(name)
            if stop_early:
                raise _Enough
            versions.clear()
            others, named = map_arguments(lambda value: noted(name, value), (args[1:], rest))
            lasting = any(not isinstance(value, (Tensor, Link, *CONSTANTS)) for value in flat((others, named)))
            recording.calls[name] = Call(others, named, keyword, lasting)

        return hook

    def after(name: str) -> Callable:
        def hook(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if any(value._version != version for value, version in versions):
                raise NotAChain(f"{name} changes what it is given in place")
            left.append(hidden_of(output))
            leaves = tree_leaves(output)
            alive.append(output)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if try_out:
                made.mark(*tensors)
                recording.outputs[name] = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            for at, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    produced.setdefault(id(leaf), Link(name, at))

        return hook

    with removed_afterwards() as hooks, made if try_out else rows or nullcontext():
        for name in names:
            block = model.get_submodule(name)
            hooks.append(block.register_forward_pre_hook(before(name), with_kwargs=True))
            hooks.append(block.register_forward_hook(after(name)))
        with suppress(_Enough):
            task.logits(model, batch)
    if len(runs) != len(names):
        raise NotAChain(f"{len(names)} blocks were run {len(runs)} times in one pass")
    return recording


def _keyword_of(kwargs: Mapping[str, Any], left: Sequence[Tensor]) -> str | None:
    """Under which name a block is handed its hidden states."""
    chained = [name for name, value in kwargs.items() if left and value is left[-1]]
    usual = [name for name in ("hidden_states", "x", "input", "hidden_state") if name in kwargs]
    return next(iter(chained or usual), None)


def watched(
    layers: Mapping[str, nn.Module], rows: TokenRows, stop_early: bool, run: Callable[[], object]
) -> list[Seen]:
    """What the layers, which share one input, showed during ``run``, once for each time that the first of them ran.

    Args:
        stop_early: the residuals are not wanted, nor a second time.
    """
    runs: list[Seen] = []
    leader = next(iter(layers))
    adds = _Adds()

    def before(name: str) -> Callable:
        def hook(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name == leader:
                runs.append(Seen(numbers=rows.rows(args[0]), of_tokens=rows.knows(args[0])))
                adds.start(runs[-1].residuals)
            # The block may go on to work in place.
            runs[-1].inputs[name] = args[0].clone() if name == leader else args[0]
            if stop_early and len(runs[-1].inputs) == len(layers):
                raise _Enough

        return hook

    def after(name: str) -> Callable:
        def hook(_layer: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            adds.watch(name, output)

        return hook

    with removed_afterwards() as hooks:
        for name, layer in layers.items():
            hooks.append(layer.register_forward_pre_hook(before(name)))
            hooks.append(layer.register_forward_hook(after(name)))
        with suppress(_Enough), rows, adds:
            run()
    return runs


class _Enough(Exception):
    """Ends a forward pass that has shown what was wanted."""


class _Adds(TorchDispatchMode):
    """Notes what a watched tensor is added to: the residual stream, whatever the model calls it.

    What is itself made from the watched tensor is no stream (``y + 0.04 y³`` in a GELU), so that is followed too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.start({})

    def start(self, residuals: dict[str, Tensor]) -> None:
        """Forget what was watched, and note what is found from here on in ``residuals``."""
        self.residuals = residuals
        self.outputs: dict[str, Tensor] = {}  # each watched tensor
        self.made_from: dict[int, set[str]] = {}  # by address of the data: names of the watched tensors it depends on
        self.alive: list[Tensor] = []  # or an address could be used twice

    def watch(self, name: str, output: Tensor) -> None:
        self.outputs[name] = output
        self._mark(output, {name})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        sources = [self.made_from.get(leaf.data_ptr(), set()) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if func in _ADDITIONS and isinstance(args[1], Tensor):
            for one, other in ((args[0], args[1]), (args[1], args[0])):
                for name in self.made_from.get(one.data_ptr(), set()) - self.made_from.get(other.data_ptr(), set()):
                    if name in self.residuals or one.shape != other.shape:
                        continue
                    # Added in place, the stream would not be what it was by the time it is looked at.
                    kept = other.clone() if func is torch.ops.aten.add_.Tensor else other
                    if _is_all_of(one, self.outputs[name]):
                        self.residuals[name] = _in_the_order_of(self.outputs[name], one, kept)
        result = func(*args, **(kwargs or {}))
        if names := set().union(*sources):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._mark(leaf, names)
        return result

    def _mark(self, tensor: Tensor, names: set[str]) -> None:
        self.made_from[tensor.data_ptr()] = self.made_from.get(tensor.data_ptr(), set()) | names
        self.alive.append(tensor)


def _is_all_of(view: Tensor, whole: Tensor) -> bool:
    """Whether these are the same numbers at the same place, in whatever order of axes."""
    return view.data_ptr() == whole.data_ptr() and view.numel() == whole.numel() and view.dtype == whole.dtype


def _in_the_order_of(output: Tensor, view: Tensor, other: Tensor) -> Tensor:
    """What is added to a view of a layer's output, as it lies beside the output itself: convolutional networks add
    B×d×h×w where their linears give B×h×w×d."""
    if output.shape == view.shape and output.stride() == view.stride():
        return other
    laid_out = torch.empty_strided(view.shape, view.stride(), dtype=other.dtype, device=other.device)
    return laid_out.copy_(other).as_strided(output.shape, output.stride())


_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@contextmanager
def removed_afterwards() -> Iterator[list[RemovableHandle]]:
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
