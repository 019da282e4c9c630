"""Gathers moments one block at a time, so that one block's activations and moments are held and no more.

The sample goes forward through the blocks once, and what enters each block is put into a spool. Then it goes backward:
from the last block to the first, every block runs again under autograd from its stored input, and the gradient of its
output is taken from the block behind it. This is checkpointing (arXiv 1604.06174) with the loop over blocks outside and
the loop over batches inside.

Processes that work together take a share of the batches each. When a block is done, its sums are added up over them.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from prehab_export.compression.block_path import BlockPath, Watching
from prehab_export.compression.chain import Chain
from prehab_export.compression.checkpoints import Checkpoint, Checkpoints
from prehab_export.compression.moments import Statistics
from prehab_export.compression.spool import Spool, Spooled
from prehab_export.compression.tally import LabelsOf, Tally
from prehab_export.inputs import Batch, device_of
from prehab_export.system import Advance, Progress, team


@dataclass(frozen=True)
class BlockCalibration:
    """What the passes over the blocks of one sample share.

    batches: this process's share of the sample, by the number of the batch in the whole sample.
    layers: the selected layers, by name.
    tally_of: creates an empty tally for these layers.
    labels_of: labels of the units, for gradients; None to gather none.
    checkpoints: those of an earlier process that was killed, and of this one; None to save none. Parts that were
        complete at the latest checkpoint are left out.
    """

    chain: Chain
    batches: Mapping[int, Batch]
    layers: Mapping[str, nn.Module]
    tally_of: Callable[[Sequence[str]], Tally]
    labels_of: LabelsOf | None
    spool: Spool
    checkpoints: Checkpoints | None = None

    def parts(self, progress: Progress) -> Generator[Statistics, None, None]:
        """Yield the moments of the layers of each block, and of those behind the last block."""
        tracks_rows = self.tally_of(list(self.layers)).tracks_rows
        path = BlockPath(self.chain.model, self.chain.task, self.spool, tracks_rows=tracks_rows)
        passes = 1 if self.labels_of is None else 2
        steps = len(self.batches) * (1 + passes * len(self.chain.blocks))
        with torch.no_grad(), progress("calibrate", steps) as advance:
            for batch in self.batches.values():
                recording = self.chain.record(batch)
                path.enter(batch, recording.entered[0], recording.calls, recording.numbers)
            yield from self._forward_parts(path, advance) if passes == 1 else self._backward_parts(path, advance)

    def _forward_parts(self, path: BlockPath, advance: Advance) -> Iterator[Statistics]:
        saved = self._saved()
        if saved is not None:
            path.restore(saved.tensors)
        for index, block in enumerate(self.chain.blocks):
            is_done = saved is not None and index < saved.parts
            tally = self.tally_of(block.layers)
            if not is_done:
                self._set_shift(tally, path, block.name)
            for number, batch in enumerate(self.batches.values()):
                if not is_done:
                    path.advance(block.name, number, self._watching(tally, batch))
                advance()
            if not is_done:
                yield self._result(tally)
                if self.checkpoints is not None:
                    self.checkpoints.save(index + 1, path.saved)
        behind = self._behind()
        self._set_shift(behind, path)
        for number, batch in enumerate(self.batches.values()):
            if behind.groups:
                with self._watching(behind, batch)(None):
                    self.chain.logits(batch, path.states[number].load())
            behind.units += len(self.chain.task.unit_labels(batch))
            advance()
        yield self._result(behind)

    def _backward_parts(self, path: BlockPath, advance: Advance) -> Iterator[Statistics]:
        saved, blocks = self._saved(), self.chain.blocks
        finished = 0 if saved is None else saved.facts["blocks"]
        remaining = blocks[: len(blocks) - finished]
        entered: dict[str, list[Spooled]] = {}
        for block in blocks:
            if block in remaining:
                entered[block.name] = list(path.states)
            for number in range(len(self.batches)):
                # What follows the last of the remaining blocks is only needed for the loss.
                if block in remaining[:-1] or saved is None:
                    path.advance(block.name, number)
                advance()
        behind, gradients = self._behind(), []
        if saved is None:
            self._set_shift(behind, path)
            for number, (place, batch) in enumerate(self.batches.items()):
                final = path.states[number].load()
                gradients.append(self.spool.keep(self._loss_gradient(behind, place, batch, final)))
                advance()
            moments = self._result(behind)
            units = moments.units
            yield moments
        else:
            units = saved.facts["units"]
            device = device_of(self.chain.model)
            gradients = [self.spool.keep(saved.tensors[str(i)].to(device)) for i in range(len(self.batches))]
            for _ in range(len(self.batches) * (1 + finished)):
                advance()
        for block in reversed(remaining):
            tally, path.states = self.tally_of(block.layers), entered.pop(block.name)
            self._set_shift(tally, path, block.name)
            for number, batch in enumerate(self.batches.values()):
                gradient = gradients[number].load()
                gradient = path.backward(block.name, number, gradient, self._watching(tally, batch))
                gradients[number] = self.spool.keep(gradient)
                advance()
            yield self._result(tally, units)
            finished += 1
            if self.checkpoints is not None:
                self.checkpoints.save(
                    finished + bool(behind.groups),
                    lambda: {str(number): gradient.load() for number, gradient in enumerate(gradients)},
                    blocks=finished,
                    units=units,
                )

    def _saved(self) -> Checkpoint | None:
        return None if self.checkpoints is None else self.checkpoints.found

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
        return partial(tally.watching, self.chain.task, batch, layers, gradients and self.labels_of is not None)

    def _loss_gradient(self, tally: Tally, place: int, batch: Batch, final: Tensor) -> Tensor:
        """Return the gradient of the summed loss at the hidden states after the last block, scaled by the tally.

        The logits are computed in pieces, since those of a whole batch may be larger than all else together.

        Args:
            place: the number of the batch in the whole sample.
        """
        assert self.labels_of is not None
        labels = self.labels_of(place)
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
