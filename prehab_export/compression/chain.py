"""Checks that a model is a chain of blocks, and runs what lies around them.

A trial on two samples checks that the blocks can be run one by one: every block, run on its own twice, has to give the
output that it gave inside the model. If one does not, the blocks are not a chain (`NotAChain`).

The trial also finds out whether the model can be run *around* its blocks, with stubs in their place. Then the arguments
of all blocks, and what follows the last block, cost next to nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prehab_export.compression.block_calls import Call, Link, flatten_arguments
from prehab_export.compression.block_path import BlockPath
from prehab_export.compression.block_stubs import BlockStubs
from prehab_export.compression.blocks import Block, NotAChain, find_blocks
from prehab_export.compression.recording import Recording, record_pass, temporary_hooks
from prehab_export.compression.spool import Spool
from prehab_export.inputs import Batch, Task

# Stands for the end of the last block, among names of layers.
_END = ""
# Largest difference between a block on its own and the same block inside the model, relative to the norm of its output.
# It allows for rounding that depends on the order of operations.
REPEATABLE = 1e-3
# Rows that are compared together.
_ROWS = 64
# Bytes of the logits of one piece of a batch, in float32. A vocabulary of 128k words makes 0.5 MB of every position.
PIECE_BYTES = 2**26


@dataclass(frozen=True)
class Chain:
    """A model whose blocks pass hidden states on, one after the other.

    order: block → its layers, in the order in which they run.
    before: other selected layers that run before the last block has run.
    stubs: stand-ins for the blocks; None if the model cannot be run around them.
    piece: number of positions of one sample whose logits make one piece; None if what follows the last block does not
        treat every position by itself.
    """

    model: nn.Module
    task: Task
    blocks: tuple[Block, ...]
    order: dict[str, list[str]]
    before: tuple[str, ...]
    stubs: BlockStubs | None
    piece: int | None

    @classmethod
    def of(cls, model: nn.Module, task: Task, batch: Batch, layers: Iterable[str]) -> "Chain":
        """Try out the blocks that hold these layers, on two samples of the batch.

        Raises:
            NotAChain: the blocks cannot be run one by one.
        """
        blocks = find_blocks(model, layers)
        if not blocks:
            raise NotAChain("the model has no list of blocks (nn.ModuleList) with these layers in it")
        in_blocks = {name: block.name for block in blocks for name in block.layers}
        two_samples = {key: value[[0, -1]] for key, value in batch.items()}
        runs: list[str] = []

        def hook(name: str) -> Callable:
            return lambda *_: runs.append(name)

        with torch.no_grad():
            with temporary_hooks() as hooks:
                for name in layers:
                    hooks.append(model.get_submodule(name).register_forward_pre_hook(hook(name)))
                hooks.append(model.get_submodule(blocks[-1].name).register_forward_hook(hook(_END)))
                recording = record_pass(model, task, two_samples, [block.name for block in blocks], trial=True)
            _check_repeatable(recording, model, task)
            stubs = _stubs(recording, model, task, two_samples)
            piece = None if stubs is None else _piece(recording, stubs, model, task, two_samples)
        before = [name for name in runs[: runs.index(_END)] if name not in in_blocks]
        order: dict[str, dict[str, None]] = {block.name: {} for block in blocks}
        for name in runs:
            if name in in_blocks:
                order[in_blocks[name]][name] = None
        return cls(
            model, task, tuple(blocks), {name: list(ran) for name, ran in order.items()}, tuple(before), stubs, piece
        )

    def block(self, name: str) -> Block:
        """Return the block with this name."""
        return next(block for block in self.blocks if block.name == name)

    @property
    def names(self) -> list[str]:
        """The names of the blocks."""
        return [block.name for block in self.blocks]

    def record(self, batch: Batch) -> Recording:
        """Record what enters the first block and the arguments of all blocks, for one batch."""
        return record_pass(self.model, self.task, batch, self.names, stubs=self.stubs)

    def logits(self, batch: Batch, final: Tensor) -> Tensor:
        """Return the logits that follow from hidden states after the last block; needs ``stubs``."""
        assert self.stubs is not None
        with self.stubs.standing_in(self.model, final):
            return self.task.logits(self.model, batch)

    def pieces(self, batch: Batch, samples: int, tokens: int) -> Iterator[tuple[slice, Batch]]:
        """Split a batch into ranges of positions whose logits are computed together, with the batch of each range.

        Ranges overlap by one position, whose next token is the first of the following range.
        """
        size = tokens if self.piece is None else max(1, self.piece // samples)
        if size >= tokens - 1:
            yield slice(0, tokens), batch
            return
        for start in range(0, tokens - 1, size):
            positions = slice(start, min(start + size + 1, tokens))
            yield positions, {name: value[:, positions] for name, value in batch.items()}


def _stubs(recording: Recording, model: nn.Module, task: Task, batch: Batch) -> BlockStubs | None:
    """Return stubs that give the same arguments and logits as the blocks themselves; None if there are none."""
    forms = {name: form for name, form in recording.forms.items() if form is not None}
    finals = [next(leaf for leaf in leaves if isinstance(leaf, Tensor)) for leaves in recording.outputs.values()]
    shapes = {tensor.shape for tensor in (*recording.entered, *finals)}
    if len(forms) < len(recording.forms) or len(shapes) > 1 or not all(map(_is_plain, recording.calls.values())):
        return None
    stubs = BlockStubs(forms, {name: call.name for name, call in recording.calls.items()})
    stubbed = record_pass(model, task, batch, list(forms), stubs=stubs)
    if not all(_same_call(stubbed.calls[name], call) for name, call in recording.calls.items()):
        return None
    with stubs.standing_in(model, finals[-1]):
        logits = task.logits(model, batch)
    return stubs if recording.logits is not None and _same(logits, recording.logits) else None


def _piece(recording: Recording, stubs: BlockStubs, model: nn.Module, task: Task, batch: Batch) -> int | None:
    """Return the number of positions in a piece if the logits of each position depend on its own hidden states only."""
    final = next(leaf for leaf in list(recording.outputs.values())[-1] if isinstance(leaf, Tensor))
    logits = recording.logits
    if (
        logits is None
        or logits.dim() != 3
        or final.dim() != 3
        or logits.shape[1] != final.shape[1]
        or final.shape[1] < 2
    ):
        return None
    half = slice(final.shape[1] // 2, final.shape[1])
    with stubs.standing_in(model, final[:, half]):
        part = task.logits(model, {name: value[:, half] for name, value in batch.items()})
    return max(1, PIECE_BYTES // (4 * logits.shape[-1])) if _same(part, logits[:, half]) else None


def _is_plain(call: Call) -> bool:
    """Return whether a block is called with nothing that depends on other blocks."""
    return not call.mutable and not call.links


def _same_call(actual: Call, expected: Call) -> bool:
    sides = [flatten_arguments((call.args, dict(call.kwargs))) for call in (actual, expected)]
    return (
        actual.name == expected.name
        and actual.kwargs.keys() == expected.kwargs.keys()
        and len(sides[0]) == len(sides[1])
        and all(_same_argument(*pair) for pair in zip(*sides, strict=True))
    )


def _same_argument(actual: Any, expected: Any) -> bool:
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        return torch.equal(actual, expected)
    return type(actual) is type(expected) and (actual is expected or bool(actual == expected))


def _check_repeatable(recording: Recording, model: nn.Module, task: Task) -> None:
    """Check that every block, run on its own twice, gives both times the output that it gave inside the model.

    Raises:
        NotAChain: a block does not.
    """
    memo: dict[int, Any] = {}
    path = BlockPath(model, task, Spool())
    path.shapes, path.masked, path.numbers = [(1, 1)], [False], [None]
    path.calls.append({name: call.separate(memo) for name, call in recording.calls.items()})
    path.carried.append(
        {Link(name, index): leaf for name, leaves in recording.outputs.items() for index, leaf in enumerate(leaves)}
    )
    for (name, outputs), hidden in zip(recording.outputs.items(), recording.entered, strict=True):
        path.states = [path.spool.keep(hidden)]
        expected = next(leaf for leaf in outputs if isinstance(leaf, Tensor))
        for _ in range(2):
            if not _same(path.output(name, 0), expected):
                raise NotAChain(f"{name} on its own does not give the output that it gives inside the model")
        path.advance(name, 0)


def _same(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding, with NaN in the same places.

    They are compared in pieces, since the logits of a large vocabulary are the largest tensors of the trial.
    """
    if actual.shape != expected.shape:
        return False
    axis = min(1, actual.dim() - 1)
    difference = size = 0.0
    for one, other in zip(actual.split(_ROWS, axis), expected.split(_ROWS, axis), strict=True):
        if not torch.equal(one.isnan(), other.isnan()):
            return False
        one, other = one.float().nan_to_num(), other.float().nan_to_num()
        difference += float((one - other).square().sum())
        size += float(other.square().sum())
    return difference**0.5 <= REPEATABLE * size**0.5 + torch.finfo(torch.float32).tiny
