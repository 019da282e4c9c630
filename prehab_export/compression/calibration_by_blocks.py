"""Gathers moments one block at a time, so that one block's activations and moments are held and no more.

The sample goes forward through the blocks once. The inputs of each block's layers are summed on the way, and what
enters each block is put into a spool. Then the part of the sample whose gradients are gathered goes backward: from the
last block to the first, every block runs again under autograd from its stored input, and the gradient of its output is
taken from the block behind it. This is checkpointing (arXiv 1604.06174) with the loop over blocks outside and the loop
over batches inside.

Processes that work together take a share of the batches each. When a block is done, its sums are added up over them.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from prehab_export.compression.block_path import BlockPath, Watching
from prehab_export.compression.chain import Chain
from prehab_export.compression.checkpoints import Checkpoint, Checkpoints
from prehab_export.compression.moments import Statistics
from prehab_export.compression.spool import Spool, Spooled
from prehab_export.compression.tally import Labels, Tally
from prehab_export.inputs import Batch, device_of
from prehab_export.system import Advance, Progress, team


@dataclass(frozen=True)
class BlockCalibration:
    """What the passes over the blocks of one sample share.

    batches: this process's share of the sample, by the number of the batch in the whole sample.
    layers: the selected layers, by name.
    tally_of: creates an empty tally for these layers, of inputs or of gradients only.
    labels_of: labels of the units of each batch whose gradients are gathered, by the number of the batch.
    gathers_gradients: whether gradients are gathered from any batch of any process.
    checkpoints: those of an earlier process that was killed, and of this one; None to save none. Parts that were
        complete at the latest checkpoint are left out.
    """

    chain: Chain
    batches: Mapping[int, Batch]
    layers: Mapping[str, nn.Module]
    tally_of: Callable[..., Tally]
    labels_of: Mapping[int, Labels]
    gathers_gradients: bool
    spool: Spool
    checkpoints: Checkpoints | None = None

    def parts(self, progress: Progress) -> Generator[Statistics, None, None]:
        """Yield the input moments of each block's layers, the moments of those behind the last block, and the gradient
        moments of each block's layers from the last to the first."""
        tracks_rows = self.tally_of(list(self.layers)).tracks_rows
        path = BlockPath(self.chain.model, self.chain.task, self.spool, tracks_rows=tracks_rows)
        steps = len(self.batches) * (1 + len(self.chain.blocks)) + len(self.labels_of) * len(self.chain.blocks)
        with torch.no_grad(), progress("calibrate", steps) as advance:
            for batch in self.batches.values():
                recording = self.chain.record(batch)
                path.enter(batch, recording.entered[0], recording.calls, recording.numbers)
            saved = None if self.checkpoints is None else self.checkpoints.found
            entered: dict[str, dict[int, Spooled]] = {}
            yield from self._forward_parts(path, entered, saved, advance)
            behind, gradients = self._behind(), dict[int, Spooled]()
            if saved is None or "units" not in saved.facts:
                self._set_shift(behind, path)
                for number, place in enumerate(self.batches):
                    gradient = self._pass_end(behind, place, path.states[number].load())
                    if gradient is not None:
                        gradients[place] = self.spool.keep(gradient)
                    advance()
                moments = self._result(behind)
                units = moments.units
                yield moments
            else:
                units, device = saved.facts["units"], device_of(self.chain.model)
                gradients = {place: self.spool.keep(saved.tensors[str(place)].to(device)) for place in self.labels_of}
                for _ in self.batches:
                    advance()
            if self.gathers_gradients:
                yield from self._backward_parts(path, entered, gradients, units, advance)

    def _forward_parts(
        self,
        path: BlockPath,
        entered: dict[str, dict[int, Spooled]],
        saved: Checkpoint | None,
        advance: Advance,
    ) -> Iterator[Statistics]:
        """Yield the input moments of each block that has none yet, and fill ``entered`` with the hidden states before
        each block whose gradients are still to be gathered: block → place of the batch → states."""
        blocks = self.chain.blocks
        done = 0 if saved is None else saved.facts["forward"]
        remaining = len(blocks) - (0 if saved is None else saved.facts["backward"])
        goes_on_backward = saved is not None and "units" in saved.facts
        for index, block in enumerate(blocks):
            if index < remaining:
                states = zip(self.batches, path.states, strict=True)
                entered[block.name] = {place: state for place, state in states if place in self.labels_of}
            tally = self.tally_of(block.layers)
            if index >= done:
                self._set_shift(tally, path, block.name)
            for number, batch in enumerate(self.batches.values()):
                if index >= done:
                    path.advance(block.name, number, self._watching(tally, batch, gradients=False))
                # What follows the last of the remaining blocks is only needed for the loss.
                elif index < remaining - 1 or not goes_on_backward:
                    path.advance(block.name, number)
                advance()
            if index >= done:
                yield self._result(tally)
                if self.checkpoints is not None:
                    self.checkpoints.save(index + 1, dict, forward=index + 1, backward=0)

    def _backward_parts(
        self,
        path: BlockPath,
        entered: dict[str, dict[int, Spooled]],
        gradients: dict[int, Spooled],
        units: int,
        advance: Advance,
    ) -> Iterator[Statistics]:
        """Yield the gradient moments of each block in ``entered``, from the last to the first.

        Args:
            gradients: place of the batch → gradient of the loss at the hidden states after the last of these blocks.
        """
        blocks = self.chain.blocks
        for _ in range(len(gradients) * (len(blocks) - len(entered))):
            advance()
        numbers = {place: number for number, place in enumerate(self.batches)}
        has_end = bool(self._behind().groups)
        while entered:
            name, states = entered.popitem()
            tally = self.tally_of(self.chain.block(name).layers, inputs=False)
            for place, state in states.items():
                number, watching = numbers[place], self._watching(tally, self.batches[place])
                path.states[number] = state
                gradient = path.backward(name, number, gradients[place].load(), watching)
                gradients[place] = self.spool.keep(gradient)
                advance()
            yield self._result(tally, units)
            finished = len(blocks) - len(entered)
            if self.checkpoints is not None:
                self.checkpoints.save(
                    len(blocks) + has_end + finished,
                    lambda: {str(place): gradient.load() for place, gradient in gradients.items()},
                    forward=len(blocks),
                    backward=finished,
                    units=units,
                )

    def _set_shift(self, tally: Tally, path: BlockPath, block: str | None = None) -> None:
        """Agree on the tally's shift with the other processes; without a block, for the layers behind the last one."""

        def watch_first(trial: Tally) -> None:
            for number, batch in enumerate(self.batches.values()):
                if trial.has_shift:
                    return
                watching = self._watching(trial, batch, gradients=False)
                if block is not None:
                    path.probe(block, number, watching)
                else:
                    with watching(None):
                        self.chain.logits(batch, path.states[number].load())

        tally.set_shift(team(), watch_first)

    def _result(self, tally: Tally, units: int | None = None) -> Statistics:
        """Return the moments of all processes' batches; ``units`` in place of those that the tally counted."""
        tally.pool(team(), device_of(self.chain.model))
        tally.units = tally.units if units is None else units
        return tally.result()

    def _behind(self) -> Tally:
        """Return an empty tally for the selected layers behind the last block."""
        in_blocks = {name for block in self.chain.blocks for name in block.layers}
        return self.tally_of([name for name in self.layers if name not in in_blocks])

    def _watching(self, tally: Tally, batch: Batch, *, gradients: bool = True) -> Watching:
        """Let the tally watch its layers on this batch."""
        layers = {name: self.layers[name] for name in tally.groups}
        return partial(tally.watching, self.chain.task, batch, layers, gradients)

    def _pass_end(self, tally: Tally, place: int, final: Tensor) -> Tensor | None:
        """Let the tally watch what follows the last block.

        Args:
            place: the number of the batch in the whole sample.
            final: hidden states after the last block.

        Returns:
            The gradient of the summed loss at ``final``, scaled by the tally; None if no gradients are gathered from
            this batch.
        """
        batch = self.batches[place]
        if place in self.labels_of:
            return self._loss_gradient(tally, self.labels_of[place], batch, final)
        if tally.groups:
            with self._watching(tally, batch, gradients=False)(None):
                self.chain.logits(batch, final)
        return None

    def _loss_gradient(self, tally: Tally, labels: Labels, batch: Batch, final: Tensor) -> Tensor:
        """Return the gradient of the summed loss at the hidden states after the last block, scaled by the tally.

        The logits are computed in pieces, since those of a whole batch may be larger than all else together.
        """
        task, gradient = self.chain.task, torch.zeros_like(final)
        # Rows that belong to two pieces would be counted twice.
        pieces = self.chain.pieces(batch, *final.shape[:2]) if not tally.groups else [(slice(None), batch)]
        for positions, part in pieces:
            leaf = final[:, positions].detach().clone().requires_grad_()
            with torch.enable_grad(), self._watching(tally, part)(None):
                unit_logits = task.unit_logits(self.chain.logits(part, leaf), part)
                loss = nn.functional.cross_entropy(unit_logits.float(), labels(unit_logits, part), reduction="sum")
                (tally.loss_scale * loss).backward()
            tally.units += unit_logits.shape[0]
            if leaf.grad is not None:
                gradient[:, positions] += leaf.grad
        return gradient
