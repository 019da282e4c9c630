"""Runs one model's blocks one at a time, on the batches of a sample.

The model calls a block once, but here it may run many times. Its arguments are treated accordingly:

- Objects that the block may write to (a cache, a list, keys and values that later blocks share) are copied when they
  first occur, once for each model. Observing a block works on a copy of that copy; only an advance leaves a trace.
- Hidden states are passed as a copy, so that a block may work in place.
- Other tensors from an earlier block's output (a second stream, a position bias) are taken from the same model.
- Anything else computed from an earlier block's output cannot be reproduced outside the model (see ``chain``).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prehab_export.compression.block_calls import Call, Link
from prehab_export.compression.blocks import LayerRun
from prehab_export.compression.dataflow import TokenRows
from prehab_export.compression.finished_modules import FinishedModules
from prehab_export.compression.recording import hidden_of, numbers_in_order, observe_layers
from prehab_export.compression.spool import Spool, Spooled
from prehab_export.inputs import Batch, Task, device_of

# What tracks the rows of a batch, if anything → a context.
Watching = Callable[[TokenRows | None], AbstractContextManager[object]]


def _unwatched(_rows: TokenRows | None) -> AbstractContextManager[object]:
    return nullcontext()


class BlockPath:
    """The progress of one model through its blocks. All lists have one entry per batch.

    states: hidden states before the current block.
    shapes: (samples, tokens) of the batch.
    masked: whether the batch has a token mask.
    numbers: token numbers of the hidden states; None if unknown.
    calls: block → the arguments of its call.
    carried: tensors from earlier blocks' outputs that later blocks need.
    finished: modules of the current block that are not run again.
    tracks_rows: whether to track the tokens of rows, which costs some time in every operation.
    """

    def __init__(self, model: nn.Module, task: Task, spool: Spool, *, tracks_rows: bool = True) -> None:
        self.model, self.task, self.spool, self.tracks_rows = model, task, spool, tracks_rows
        self.states: list[Spooled] = []
        self.shapes: list[tuple[int, int]] = []
        self.masked: list[bool] = []
        self.numbers: list[Tensor | None] = []
        self.calls: list[dict[str, Call]] = []
        self.carried: list[dict[Link, Tensor]] = []
        self.finished = FinishedModules(model, spool)
        self._needed: set[Link] = set()

    def enter(self, batch: Batch, hidden: Tensor, calls: dict[str, Call], numbers: Tensor | None) -> None:
        """Add a batch, with its hidden states before the first block and the calls of all blocks."""
        mask = self.task.token_mask(batch)
        self.states.append(self.spool.keep(hidden))
        self.shapes.append((hidden.shape[0], hidden.shape[1]) if mask is None else (mask.shape[0], mask.shape[1]))
        self.masked.append(mask is not None)
        self.numbers.append(numbers)
        self.calls.append(calls)
        self.carried.append({})
        self._needed |= {link for call in calls.values() for link in call.links}

    def saved(self) -> dict[str, Tensor]:
        """Return the states of all batches as `restore` takes them."""
        states = {f"state/{number}": state.load() for number, state in enumerate(self.states)}
        return states | {f"rows/{number}": rows for number, rows in enumerate(self.numbers) if rows is not None}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Put the path back to where `saved` was called, after all batches have entered.

        The blocks must not be called with anything that depends on other blocks.
        """
        device = device_of(self.model)
        self.states = [self.spool.keep(saved[f"state/{i}"].to(device)) for i in range(len(self.states))]
        rows = [saved.get(f"rows/{number}") for number in range(len(self.numbers))]
        self.numbers = [None if numbers is None else numbers.to(device) for numbers in rows]

    def inputs(self, block: str, number: int) -> tuple[nn.Module, Tensor, Call]:
        """Return the block, and copies of its hidden states and call, so that running it leaves no trace."""
        hidden = self.states[number].load().clone()
        return self.model.get_submodule(block), hidden, self.calls[number][block].separate({})

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

    def advance(self, block: str, number: int, watching: Watching = _unwatched) -> None:
        """Run the block, as it is now, on the states of one batch.

        Args:
            watching: context to run it in, given what tracks the rows.
        """
        module, before = self.model.get_submodule(block), self.states[number].load().clone()
        rows = self.token_rows(number, before) if self.tracks_rows else None
        standing_in = nullcontext() if rows is None else self.finished.standing_in(number, rows)
        with self.task.running(module), watching(rows), standing_in, rows or nullcontext():
            output = self.calls[number][block].run(module, before, self.carried[number])
        self._keep(number, block, output, rows)

    def probe(self, block: str, number: int, watching: Watching) -> None:
        """Run the block on the states of one batch as `advance` does, without changing any state."""
        module, hidden, call = self.inputs(block, number)
        rows = self.token_rows(number, hidden) if self.tracks_rows else None
        with self.task.running(module), watching(rows), rows or nullcontext():
            call.run(module, hidden, self.carried[number])

    def advance_recorded(self, block: str, number: int, groups: Sequence[Sequence[str]]) -> list[list[LayerRun]]:
        """Run the block as `advance` does, and return records of these groups of layers (see `observe_layers`)."""
        module, before = self.model.get_submodule(block), self.states[number].load().clone()
        outputs: list[Any] = []
        rows = self.token_rows(number, before)

        def run() -> None:
            outputs.append(self.calls[number][block].run(module, before, self.carried[number]))

        with self.task.running(module):
            records = observe_layers([self.layers(group) for group in groups], rows, run)
        self._keep(number, block, outputs[0], rows)
        return records

    def _keep(self, number: int, block: str, output: Any, rows: TokenRows | None) -> None:
        """Keep the hidden states in a block's output, and what later blocks need of it."""
        hidden, leaves = hidden_of(output), tree_leaves(output)
        self.states[number] = self.spool.keep(hidden)
        self.numbers[number] = None if rows is None else rows.numbers(hidden)
        self.carried[number] |= {link: leaves[link.index] for link in self._needed if link.block == block}

    def observe(self, block: str, number: int, names: Sequence[str], writers: Collection[str] | None) -> list[LayerRun]:
        """Record layers of the block, which read the same input, without changing any state.

        Args:
            writers: as in `observe_layers`.
        """
        module, hidden, call = self.inputs(block, number)
        rows = self.token_rows(number, hidden)
        with self.task.running(module), self.finished.standing_in(number, rows):
            (runs,) = observe_layers(
                [self.layers(names)], rows, lambda: call.run(module, hidden, self.carried[number]), writers=writers
            )
        return runs

    def backward(self, block: str, number: int, gradient: Tensor, watching: Watching) -> Tensor:
        """Run the block under autograd, and return the gradient of its hidden states from that of its output.

        The block must not be called with anything that depends on other blocks.

        Args:
            watching: context to run it in, forward and backward, given what tracks the rows.
        """
        module, leaf = self.model.get_submodule(block), self.states[number].load().detach().requires_grad_()
        rows = self.token_rows(number, leaf) if self.tracks_rows else None
        with watching(rows):
            with torch.enable_grad(), self.task.running(module), rows or nullcontext():
                output = hidden_of(self.calls[number][block].run(module, leaf.clone(), {}))
            output.backward(gradient.to(output.dtype))
        return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    def layers(self, names: Iterable[str]) -> dict[str, nn.Module]:
        """Return these layers as they are now, by name."""
        return {name: self.model.get_submodule(name) for name in names}
