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

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prehab_export.compression.block_calls import Call, Link
from prehab_export.compression.blocks import Block, NotAChain, Seen
from prehab_export.compression.dataflow import TokenRows
from prehab_export.compression.recording import (
    Recording,
    as_they_stand,
    hidden_of,
    recorded,
    removed_afterwards,
    watched,
)
from prehab_export.inputs import Batch, Task, device_of, moved

# How far a block on its own may be from the same block inside the model, relative to the size of its output: rounding
# that depends on the order of work.
REPEATABLE = 1e-3


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
            rows.number(hidden, as_they_stand(hidden))
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
        recording = recorded(self.dense, self.task, batch, names)
        hidden = recording.entered[0]
        shape = (hidden.shape[0], hidden.shape[1]) if mask is None else (mask.shape[0], mask.shape[1])
        self.masks.append(mask)
        memo: dict[int, Any] = {}
        calls = {name: call.separate(memo) for name, call in recording.calls.items()}
        entered = recorded(self.student, self.task, batch, names[:1], stop_early=True).entered[0]
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

        with removed_afterwards() as hooks:
            for block in blocks:
                for name in block.layers:
                    hooks.append(self.dense.get_submodule(name).register_forward_pre_hook(hook(block.name, name)))
            recording = recorded(self.dense, self.task, two, list(order), try_out=True)
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


def _check_repeatable(recording: Recording, model: nn.Module, task: Task) -> None:
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
