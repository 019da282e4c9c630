"""Runs two models side by side, one repeated block at a time: the dense model and the student that is compressed.

Drift-anchored truncation and block-wise refinement both work block by block. They need to know which layers are in
which block, what a block is called with on the calibration sample, and what flows into a layer in both models. Blocks
are run on their own, so a walk over the whole model costs a few forward passes, however deep the model is.

The model calls a block once, but the walk runs it many times. Its arguments are treated accordingly:

- Objects that the block may write to (a cache, a list, keys and values that later blocks share) are copied when they
  first occur, once for each model. Observing the student works on a copy of that copy; only an advance leaves a trace.
- Hidden states are passed as a copy, so that a block may work in place.
- Other tensors from an earlier block's output (a second stream, a position bias) are taken from the same model.
- Anything else computed from an earlier block's output cannot be reproduced outside the model.

A trial before the walk checks that this is enough: on two samples every block, run on its own twice, has to give the
output that it gave inside the model. If one does not, the blocks are not a chain (`NotAChain`), and only ``ModelWalk``
can be used.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prehab_export.compression.block_calls import Call, Link
from prehab_export.compression.blocks import Block, LayerRun, NotAChain
from prehab_export.compression.dataflow import TokenRows
from prehab_export.compression.recording import (
    Recording,
    hidden_of,
    numbers_in_order,
    observe_layers,
    record_pass,
    temporary_hooks,
)
from prehab_export.inputs import Batch, Task, device_of, moved

# Largest difference between a block on its own and the same block inside the model, relative to the norm of its output.
# It allows for rounding that depends on the order of operations.
REPEATABLE = 1e-3


class _Path:
    """The progress of one model through its blocks. All lists have one entry per batch.

    states: hidden states before the current block.
    shapes: (samples, tokens) of the batch.
    masked: whether the batch has a token mask.
    numbers: token numbers of the hidden states; None if unknown.
    calls: block → the arguments of its call.
    carried: tensors from earlier blocks' outputs that later blocks need.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.model, self.task = model, task
        self.states: list[Tensor] = []
        self.shapes: list[tuple[int, int]] = []
        self.masked: list[bool] = []
        self.numbers: list[Tensor | None] = []
        self.calls: list[dict[str, Call]] = []
        self.carried: list[dict[Link, Tensor]] = []

    def inputs(self, block: str, number: int) -> tuple[nn.Module, Tensor, Call]:
        """Return the block, and copies of its hidden states and call, so that running it leaves no trace."""
        return self.model.get_submodule(block), self.states[number].clone(), self.calls[number][block].separate({})

    def output(self, block: str, number: int) -> Tensor:
        """Return the hidden states after the block, without changing any state."""
        module, hidden, call = self.inputs(block, number)
        with self.task.running(module):
            return hidden_of(call.run(module, hidden, self.carried[number]))

    def token_rows(self, number: int, hidden: Tensor) -> TokenRows:
        """Return a context that tracks the rows of a batch's hidden states through the current block."""
        rows = TokenRows(self.shapes[number])
        numbers = self.numbers[number]
        if numbers is not None:
            rows.number(hidden, numbers)
        elif not self.masked[number] or hidden[..., 0].numel() == self.shapes[number][0] * self.shapes[number][1]:
            rows.number(hidden, numbers_in_order(hidden))
        else:  # it is unknown which of these rows are padding
            rows.mark(hidden)
        return rows

    def advance(
        self, block: str, number: int, needed: Iterable[Link], groups: Sequence[Sequence[str]] = ()
    ) -> list[list[LayerRun]]:
        """Run the block, as it is now, on the states of one batch, and keep the outputs that later blocks need.

        Returns:
            Records of these groups of layers, as from `observe_layers`.
        """
        module, before, outputs = self.model.get_submodule(block), self.states[number], list[Any]()
        rows = self.token_rows(number, before)

        def run() -> None:
            outputs.append(self.calls[number][block].run(module, before, self.carried[number]))

        with self.task.running(module):
            records = observe_layers([self.layers(group) for group in groups], rows, run)
        hidden = hidden_of(outputs[0])
        self.states[number], self.numbers[number] = hidden, rows.numbers(hidden)
        leaves = tree_leaves(outputs[0])
        self.carried[number] |= {link: leaves[link.index] for link in needed if link.block == block}
        return records

    def observe(self, block: str, number: int, names: Sequence[str], writers: Collection[str] | None) -> list[LayerRun]:
        """Record layers of the block, which read the same input, without changing any state.

        Args:
            writers: as in `observe_layers`.
        """
        module, hidden, call = self.inputs(block, number)
        rows = self.token_rows(number, hidden)
        with self.task.running(module):
            (runs,) = observe_layers(
                [self.layers(names)], rows, lambda: call.run(module, hidden, self.carried[number]), writers=writers
            )
        return runs

    def layers(self, names: Iterable[str]) -> dict[str, nn.Module]:
        """Return these layers as they are now, by name."""
        return {name: self.model.get_submodule(name) for name in names}


class BlockWalk:
    """Keeps the hidden states of both models at the current block, for every batch of the sample.

    Each block is first opened, which runs the dense block once and records what its layers read, then observed in the
    student as often as needed, and then left behind by `advance`. The states are on the models' device, in the dtypes
    that blocks pass on in the task's precision.

    Raises (when created):
        NotAChain: the blocks cannot be run one by one.
    """

    def __init__(
        self, dense: nn.Module, student: nn.Module, task: Task, batches: Iterable[Batch], blocks: Sequence[Block]
    ) -> None:
        self.dense, self.student, self.task = dense, student, task
        self.masks: list[Tensor | None] = []
        self._dense, self._student = _Path(dense, task), _Path(student, task)
        #: Block → its layers, in the order in which they run.
        self.order: dict[str, list[str]] = {}
        # First layer of a group of the open block → records of its runs in the dense model, for every batch.
        self._records: dict[str, list[list[LayerRun]]] = {}
        names, device = [block.name for block in blocks], device_of(dense)
        for batch in (moved(batch, device) for batch in batches):
            if not self.masks:
                self._check(batch, blocks)
            self._enter(batch, names)
        self._needed = {link for calls in self._dense.calls for call in calls.values() for link in call.links}

    @property
    def dense_states(self) -> list[Tensor]:
        """The dense model's hidden states after the block that was opened last, one tensor per batch."""
        return self._dense.states

    def _enter(self, batch: Batch, names: Sequence[str]) -> None:
        """Take a batch to the first block in both models, and store the arguments of all blocks."""
        mask = self.task.token_mask(batch)
        recording = record_pass(self.dense, self.task, batch, names)
        hidden = recording.entered[0]
        shape = (hidden.shape[0], hidden.shape[1]) if mask is None else (mask.shape[0], mask.shape[1])
        self.masks.append(mask)
        memo: dict[int, Any] = {}
        copies = {name: call.separate(memo) for name, call in recording.calls.items()}
        entered = record_pass(self.student, self.task, batch, names[:1], stop_early=True).entered[0]
        for path, states, calls in ((self._dense, hidden, recording.calls), (self._student, entered, copies)):
            path.states.append(states)
            path.calls.append(calls)
            path.carried.append({})
            path.shapes.append(shape)
            path.masked.append(mask is not None)
            path.numbers.append(recording.numbers)

    def _check(self, batch: Batch, blocks: Sequence[Block]) -> None:
        """Find the order of the layers, and check that blocks on their own compute the same, both on two samples."""
        two_samples = {key: value[[0, -1]] for key, value in batch.items()}
        order: dict[str, list[str]] = {block.name: [] for block in blocks}

        def hook(block: str, name: str) -> Callable:
            return lambda _layer, _args: order[block].append(name)

        with temporary_hooks() as hooks:
            for block in blocks:
                for name in block.layers:
                    hooks.append(self.dense.get_submodule(name).register_forward_pre_hook(hook(block.name, name)))
            recording = record_pass(self.dense, self.task, two_samples, list(order), trial=True)
        self.order = {block: list(dict.fromkeys(names)) for block, names in order.items()}
        _check_repeatable(recording, self.dense, self.task)

    def open(self, block: Block, groups: Sequence[Sequence[str]]) -> None:
        """Run the dense block on every batch, and record these groups of its layers; each group reads one input."""
        self._records = {group[0]: [] for group in groups}
        for number in range(len(self.masks)):
            records = self._dense.advance(block.name, number, self._needed, groups)
            for group, runs in zip(groups, records, strict=True):
                self._records[group[0]].append(_without_unneeded_input(group, runs))

    def observe(
        self, block: Block, names: Sequence[str]
    ) -> Iterator[tuple[list[LayerRun], list[LayerRun], Tensor | None, int]]:
        """Observe a group of layers of the open block in the student, on every batch.

        Yields:
            Runs in the dense model, runs in the student (one record for each time that the layers run), the token mask,
            and the number of positions in the hidden states.
        """
        for number, mask in enumerate(self.masks):
            dense = self._records[names[0]][number]
            writers = dense[0].residuals if len(dense) == 1 else None
            student = self._student.observe(block.name, number, names, writers)
            yield dense, student, mask, self._student.states[number][..., 0].numel()

    def output(self, block: Block, number: int) -> Tensor:
        """Return the output of the student's block on the student's states of one batch."""
        return self._student.output(block.name, number)

    def advance(self, block: Block) -> None:
        """Leave the open block: advance the student's states through its block as it is now."""
        self._records = {}
        for number in range(len(self.masks)):
            self._student.advance(block.name, number, self._needed)


def _without_unneeded_input(group: Sequence[str], runs: list[LayerRun]) -> list[LayerRun]:
    """Drop the input of layers that all write to a residual stream: their outputs are the targets (see ``drift``)."""
    if len(runs) == 1 and set(group) <= runs[0].outputs.keys():
        runs[0].input = None
    return runs


def _check_repeatable(recording: Recording, model: nn.Module, task: Task) -> None:
    """Check that every block, run on its own twice, gives both times the output that it gave inside the model.

    Raises:
        NotAChain: a block does not.
    """
    memo: dict[int, Any] = {}
    path = _Path(model, task)
    path.shapes, path.masked, path.numbers = [(1, 1)], [False], [None]
    path.calls.append({name: call.separate(memo) for name, call in recording.calls.items()})
    path.carried.append(
        {Link(name, index): leaf for name, leaves in recording.outputs.items() for index, leaf in enumerate(leaves)}
    )
    for (name, outputs), hidden in zip(recording.outputs.items(), recording.entered, strict=True):
        path.states = [hidden]
        expected = next(leaf for leaf in outputs if isinstance(leaf, Tensor))
        for _ in range(2):
            if not _same(path.output(name, 0), expected):
                raise NotAChain(f"{name} on its own does not give the output that it gives inside the model")
        path.advance(name, 0, ())


def _same(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding, with NaN in the same places."""
    if actual.shape != expected.shape or not torch.equal(actual.isnan(), expected.isnan()):
        return False
    actual, expected = actual.float().nan_to_num(), expected.float().nan_to_num()
    return bool((actual - expected).norm() <= REPEATABLE * expected.norm() + torch.finfo(torch.float32).tiny)
