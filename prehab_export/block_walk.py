"""Two models side by side, one repeated block at a time: the dense one, and the one that is being compressed.

Whatever works block by block (drift-anchored truncation, block-wise refinement) needs the same three things: which
layers lie in which block, what a block is called with on the calibration sample, and what flows into a layer in both
models. A block is run by itself, so that a walk over the whole model costs a few forward passes however deep it is.

A block is run many times, though the model calls it once. So what it is called with must bear that:

- Objects that it may write to (a cache, a list, keys and values that later blocks share) are copied when they are first
  seen, once for each model. A look into a block works on a copy of the copy; only a step beyond it leaves a trace.
- Hidden states are handed over as a copy, so that a block may work in place.
- What else of an earlier block's output it is given (a second stream, a bias of positions) comes from the same model.
- Anything else that was made from an earlier block's output cannot be had without the model around it.

Whether all that is enough is tried before the walk: on two samples every block, run by itself twice, has to give what
it gave inside the model. Where it does not, the blocks are no chain (`NotAChain`), and ``ModelWalk`` remains.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from prehab_export.dataflow import MadeFrom, TokenRows, tensors_in
from prehab_export.devices import device_of, moved
from prehab_export.tasks import Batch, Task, token_rows

# How far a block on its own may be from the same block inside the model, relative to the size of its output: rounding
# that depends on the order of work.
REPEATABLE = 1e-3
# What a block can be given again as it is.
_NUMBERS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_CONSTANTS = (*_NUMBERS, nn.Module, type, FunctionType, MethodType)


class NotAChain(Exception):
    """The model's blocks do not hand their output straight to the next one, once a pass; the text says where."""


@dataclass(frozen=True)
class Block:
    """One entry of the model's list of blocks, and the targeted layers inside it in the model's order."""

    name: str
    layers: tuple[str, ...]


@dataclass
class Seen:
    """What one run of some layers with a common input showed: the input of each, and, for layers whose output is added
    to a residual stream, what it was added to.

    numbers: of every row of the input, which token it is (see ``dataflow.TokenRows``); None where that is not known.
    of_tokens: whether the input was made from tokens at all.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    residuals: dict[str, Tensor] = field(default_factory=dict)
    numbers: Tensor | None = None
    of_tokens: bool = True

    def valid(self, mask: Tensor | None) -> Tensor | None:
        """Which rows of the input count, in its shape without the last; None for all. mask: bool (B, T)."""
        if mask is None or self.numbers is None:
            return None
        return (self.numbers >= 0) & mask.flatten()[self.numbers.long().clamp_min(0)]


@dataclass(frozen=True)
class Link:
    """A tensor of an earlier block's output: the one at this place of its leaves."""

    block: str
    at: int


@dataclass(frozen=True)
class Call:
    """What a block is called with besides its hidden states, which come first or under ``name``. Among positional and
    keyword arguments and inside tuples, a `Link` stands for what comes from an earlier block.

    lasting: whether it holds something that the block may write to.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    name: str | None = None
    lasting: bool = False

    def separate(self, memo: dict[int, Any]) -> "Call":
        """The same with its own copy of whatever the block may write to. ``memo``: of copies that were made already."""
        if not self.lasting:
            return self
        args, kwargs = _map(lambda value: _copied(value, memo), (self.args, dict(self.kwargs)))
        return Call(args, kwargs, self.name, True)

    def made(self, block: nn.Module, hidden: Tensor, carried: Mapping[Link, Tensor]) -> Any:
        """What the block returns."""
        args, kwargs = _map(
            lambda value: carried[value] if isinstance(value, Link) else value, (self.args, dict(self.kwargs))
        )
        return block(hidden, *args, **kwargs) if self.name is None else block(*args, **{self.name: hidden}, **kwargs)

    @property
    def links(self) -> list[Link]:
        return [value for value in _flat((self.args, dict(self.kwargs))) if isinstance(value, Link)]


def _map(action: Callable[[Any], Any], value: Any, depth: int = 0) -> Any:
    """``action`` on what stands in positional and keyword arguments, and in tuples among them."""
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        parts = [_map(action, part, depth + 1) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict) and depth == 1:
        return {key: _map(action, part, depth + 1) for key, part in value.items()}
    return action(value)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, (Tensor, Link, *_CONSTANTS)):
        return value
    try:
        return copy.deepcopy(value, memo)
    except (TypeError, RuntimeError) as error:
        raise NotAChain(f"blocks are given a {type(value).__name__}, which cannot be copied ({error})") from error


def find_blocks(model: nn.Module, layers: Iterable[str]) -> list[Block]:
    """The blocks that hold the named layers; a layer outside every ``nn.ModuleList`` is in none."""
    found: dict[str, list[str]] = {}
    for name in layers:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            entry = ".".join(parts[: depth + 1])
            held = isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList)
            # A list in a list holds the blocks, and is none itself.
            if held and not isinstance(model.get_submodule(entry), nn.ModuleList):
                found.setdefault(entry, []).append(name)
                break
    return [Block(name, tuple(inside)) for name, inside in found.items()]


class _Path:
    """One model on its way: for every batch the hidden states in front of the current block, the numbers of their rows,
    what each block is called with, and what of earlier blocks' output is still wanted."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.model, self.task = model, task
        self.states: list[Tensor] = []
        self.shapes: list[tuple[int, int]] = []
        self.masked: list[bool] = []
        self.numbers: list[Tensor | None] = []
        self.calls: list[dict[str, Call]] = []
        self.carried: list[dict[Link, Tensor]] = []

    def looked_at(self, block: str, number: int) -> tuple[nn.Module, Tensor, Call]:
        """The block, and what it can be run with without leaving a trace."""
        return self.model.get_submodule(block), self.states[number].clone(), self.calls[number][block].separate({})

    def output(self, block: str, number: int) -> Tensor:
        """Hidden states out of the block; nothing is changed by it."""
        inner, hidden, call = self.looked_at(block, number)
        with self.task.running(inner):
            return hidden_of(call.made(inner, hidden, self.carried[number]))

    def followed(self, number: int, hidden: Tensor) -> TokenRows:
        """What follows the rows of a batch's hidden states through the current block."""
        rows = TokenRows(self.shapes[number])
        numbers = self.numbers[number]
        if numbers is not None:
            rows.number(hidden, numbers)
        elif not self.masked[number] or hidden[..., 0].numel() == self.shapes[number][0] * self.shapes[number][1]:
            rows.number(hidden, _as_they_stand(hidden))
        else:  # which of these is padding nobody can tell
            rows.mark(hidden)
        return rows

    def advance(self, block: str, wanted: Iterable[Link]) -> None:
        """Take the states of every batch through the block as it now is."""
        inner = self.model.get_submodule(block)
        for number, calls in enumerate(self.calls):
            before = self.states[number]
            with self.task.running(inner), self.followed(number, before) as rows:
                output = calls[block].made(inner, before, self.carried[number])
            hidden = hidden_of(output)
            self.states[number], self.numbers[number] = hidden, rows.numbers(hidden)
            leaves = tree_leaves(output)
            self.carried[number] |= {link: leaves[link.at] for link in wanted if link.block == block}


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
        self._dense, self._student = _Path(dense, task), _Path(student, task)
        #: Layers of each block in the order in which they run.
        self.order: dict[str, list[str]] = {}
        names, device = [block.name for block in blocks], device_of(dense)
        for batch in (moved(batch, device) for batch in batches):
            if not self.masks:
                self._try_out(batch, blocks)
            self._enter(batch, names)
        self._wanted = {link for calls in self._dense.calls for call in calls.values() for link in call.links}

    @property
    def dense_states(self) -> list[Tensor]:
        return self._dense.states

    def _enter(self, batch: Batch, names: Sequence[str]) -> None:
        """Put both models in front of the first block, and note what the blocks are called with."""
        mask = self.task.token_mask(batch)
        recording = _recorded(self.dense, self.task, batch, names)
        hidden = recording.entered[0]
        shape = (hidden.shape[0], hidden.shape[1]) if mask is None else (mask.shape[0], mask.shape[1])
        self.masks.append(mask)
        memo: dict[int, Any] = {}
        calls = {name: call.separate(memo) for name, call in recording.calls.items()}
        entered = _recorded(self.student, self.task, batch, names[:1], stop_early=True).entered[0]
        for path, states, own in ((self._dense, hidden, recording.calls), (self._student, entered, calls)):
            path.states.append(states)
            path.calls.append(own)
            path.carried.append({})
            path.shapes.append(shape)
            path.masked.append(mask is not None)
            path.numbers.append(recording.numbers)

    def _try_out(self, batch: Batch, blocks: Sequence[Block]) -> None:
        """On two samples: the layers' order, and whether each block by itself does what it does inside the model."""
        two = {key: value[[0, -1]] for key, value in batch.items()}
        order: dict[str, list[str]] = {block.name: [] for block in blocks}

        def hook(block: str, name: str) -> Callable:
            return lambda _layer, _args: order[block].append(name)

        with _hooks() as hooks:
            for block in blocks:
                for name in block.layers:
                    hooks.append(self.dense.get_submodule(name).register_forward_pre_hook(hook(block.name, name)))
            recording = _recorded(self.dense, self.task, two, list(order), try_out=True)
        self.order = {block: list(dict.fromkeys(names)) for block, names in order.items()}
        _check_repeatable(recording, self.dense, self.task)

    def observe(
        self, block: Block, names: Sequence[str]
    ) -> Iterator[tuple[list[Seen], list[Seen], Tensor | None, int]]:
        """(in the dense model, in the student, token mask, positions) for every batch: the inputs of the named
        layers, which share one input, and their residuals, once for each time that they run."""
        stop_early = False
        for number, mask in enumerate(self.masks):
            seen = [self._look(path, block, names, number, stop_early) for path in (self._dense, self._student)]
            # A layer that writes to the residual stream shows it only after it has run.
            stop_early = not any(run.residuals for run in seen[0]) and len(seen[0]) == 1
            yield seen[0], seen[1], mask, self.dense_states[number][..., 0].numel()

    def _look(self, path: _Path, block: Block, names: Sequence[str], number: int, stop_early: bool) -> list[Seen]:
        inner, hidden, call = path.looked_at(block.name, number)
        rows = path.followed(number, hidden)
        layers = {name: path.model.get_submodule(name) for name in names}
        with self.task.running(path.model):
            return watched(layers, rows, stop_early, lambda: call.made(inner, hidden, path.carried[number]))

    def targets(self, block: Block) -> list[Tensor]:
        """The dense block's output on the dense model's states, a batch at a time."""
        return [self._dense.output(block.name, number) for number in range(len(self.masks))]

    def output(self, block: Block, number: int) -> Tensor:
        """The student's block's output on the student's states of one batch."""
        return self._student.output(block.name, number)

    def advance(self, block: Block) -> None:
        """Take both models' states through the block as it now is."""
        for path in (self._dense, self._student):
            path.advance(block.name, self._wanted)


class ModelWalk:
    """Both models from end to end, for every batch of the sample: for models whose blocks are no chain, or are run more
    than once. Every look costs whole forward passes."""

    def __init__(self, dense: nn.Module, task: Task, batches: Iterable[Batch], layers: Sequence[str]) -> None:
        self.dense, self.task = dense, task
        device = device_of(dense)
        self.batches = [moved(batch, device) for batch in batches]
        runs: list[str] = []
        with _hooks() as hooks:
            for name in layers:
                layer = dense.get_submodule(name)
                hooks.append(layer.register_forward_pre_hook(lambda _layer, _args, name=name: runs.append(name)))
            task.logits(dense, {key: value[:1] for key, value in self.batches[0].items()})
        #: The layers in the order in which they first run.
        self.order = list(dict.fromkeys(runs))
        #: Whether one of them runs more than once.
        self.repeats = len(runs) > len(self.order)

    def observe(
        self, student: nn.Module, names: Sequence[str]
    ) -> Iterator[tuple[list[Seen], list[Seen], Tensor | None, int]]:
        """As `BlockWalk.observe`; positions are 0 where they are not known."""
        for batch in self.batches:
            mask = self.task.token_mask(batch)
            sides = [self._look(model, batch, mask, names) for model in (self.dense, student)]
            yield sides[0], sides[1], mask, 0 if mask is None else mask.numel()

    def _look(self, model: nn.Module, batch: Batch, mask: Tensor | None, names: Sequence[str]) -> list[Seen]:
        layers = {name: model.get_submodule(name) for name in names}
        rows = token_rows(batch, mask)
        with self.task.running(model):
            return watched(layers, rows, False, lambda: self.task.logits(model, batch))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: the first tensor of it.

    Raises:
        NotAChain: there is none.
    """
    first = output if isinstance(output, Tensor) else next(tensors_in(output), None)
    if first is None:
        raise NotAChain(f"a block returns a {type(output).__name__} without a tensor in it")
    return first


def _as_they_stand(hidden: Tensor) -> Tensor:
    """Numbers for hidden states (B×…×d, or B×d×h×w as convolutions have them) whose tokens could not be followed."""
    spots = hidden[..., 0].shape if hidden.dim() != 4 else (hidden.shape[0], 1, *hidden.shape[2:])
    count = torch.Size(spots).numel()
    numbers = torch.arange(count, dtype=torch.int32, device=hidden.device).reshape(spots)
    return (numbers if hidden.dim() == 4 else numbers[..., None]).expand(hidden.shape)


@dataclass
class _Recording:
    """One pass through the model: what entered each block (of all but the first only in a trial), its call, and what
    it gave (in a trial). numbers: of the rows of what entered the first block."""

    calls: dict[str, Call] = field(default_factory=dict)
    entered: list[Tensor] = field(default_factory=list)
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    numbers: Tensor | None = None


def _recorded(
    model: nn.Module,
    task: Task,
    batch: Batch,
    names: Sequence[str],
    *,
    stop_early: bool = False,
    try_out: bool = False,
) -> _Recording:
    """Run one batch and note what every block is called with.

    Args:
        stop_early: end in front of the first block.
        try_out: keep what enters and leaves each block, and look at what else of it depends on earlier blocks.
    """
    recording, memo = _Recording(), dict[int, Any]()
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
        return _copied(value, memo)

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
            others, named = _map(lambda value: noted(name, value), (args[1:], rest))
            lasting = any(not isinstance(value, (Tensor, Link, *_CONSTANTS)) for value in _flat((others, named)))
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

    with _hooks() as hooks, made if try_out else rows or nullcontext():
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


def _flat(arguments: Any, depth: int = 0) -> list[Any]:
    """What `_map` acts on."""
    if isinstance(arguments, tuple) and not isinstance(arguments, torch.Size):
        return [value for part in arguments for value in _flat(part, depth + 1)]
    if isinstance(arguments, dict) and depth == 1:
        return [value for part in arguments.values() for value in _flat(part, depth + 1)]
    return [arguments]


def _check_repeatable(recording: _Recording, model: nn.Module, task: Task) -> None:
    """Raises:
    NotAChain: a block by itself, run twice, does not give both times what it gave inside the model.
    """
    memo: dict[int, Any] = {}
    path = _Path(model, task)
    path.shapes, path.masked, path.numbers = [(1, 1)], [False], [None]
    path.calls.append({name: call.separate(memo) for name, call in recording.calls.items()})
    path.carried.append(
        {Link(name, at): leaf for name, leaves in recording.outputs.items() for at, leaf in enumerate(leaves)}
    )
    for (name, outputs), hidden in zip(recording.outputs.items(), recording.entered, strict=True):
        path.states = [hidden]
        expected = next(leaf for leaf in outputs if isinstance(leaf, Tensor))
        for _ in range(2):
            if not _same(path.output(name, 0), expected):
                raise NotAChain(f"{name} by itself does not give what it gives inside the model")
        path.advance(name, ())


def _same(found: Tensor, expected: Tensor) -> bool:
    """Equal to rounding; what is no number in one is none in the other."""
    if found.shape != expected.shape or not torch.equal(found.isnan(), expected.isnan()):
        return False
    found, expected = found.float().nan_to_num(), expected.float().nan_to_num()
    return bool((found - expected).norm() <= REPEATABLE * expected.norm() + torch.finfo(torch.float32).tiny)


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

    with _hooks() as hooks:
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
def _hooks() -> Iterator[list[RemovableHandle]]:
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
