"""Gathers moments one block at a time, so that one block's activations and moments are held and no more.

The sample goes forward through the blocks once, and what enters each block is put into a spool. Then it goes backward:
from the last block to the first, every block runs again under autograd from its stored input, and the gradient of its
output is taken from the block behind it. This is checkpointing (arXiv 1604.06174) with the loop over blocks outside and
the loop over batches inside.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from prehab_export.compression.block_path import BlockPath, Watching
from prehab_export.compression.chain import Chain
from prehab_export.compression.moments import Statistics
from prehab_export.compression.spool import Spool, Spooled
from prehab_export.compression.tally import LabelsOf, Tally
from prehab_export.inputs import Batch
from prehab_export.system import Advance, Progress


@dataclass(frozen=True)
class BlockCalibration:
    """What the passes over the blocks of one sample share.

    layers: the selected layers, by name.
    tally_of: creates an empty tally for these layers.
    labels_of: labels of the units, for gradients; None to gather none.
    """

    chain: Chain
    batches: Sequence[Batch]
    layers: Mapping[str, nn.Module]
    tally_of: Callable[[Sequence[str]], Tally]
    labels_of: LabelsOf | None
    spool: Spool

    def parts(self, progress: Progress) -> Iterator[Statistics]:
        """Yield the moments of the layers of each block, and of those behind the last block."""
        tracks_rows = self.tally_of(list(self.layers)).tracks_rows
        path = BlockPath(self.chain.model, self.chain.task, self.spool, tracks_rows=tracks_rows)
        passes = 1 if self.labels_of is None else 2
        steps = len(self.batches) * (1 + passes * len(self.chain.blocks))
        with torch.no_grad(), progress("calibrate", steps) as advance:
            for batch in self.batches:
                recording = self.chain.record(batch)
                path.enter(batch, recording.entered[0], recording.calls, recording.numbers)
            yield from self._forward_parts(path, advance) if passes == 1 else self._backward_parts(path, advance)

    def _forward_parts(self, path: BlockPath, advance: Advance) -> Iterator[Statistics]:
        for block in self.chain.blocks:
            tally = self.tally_of(block.layers)
            for number, batch in enumerate(self.batches):
                path.advance(block.name, number, self._watching(tally, batch))
                advance()
            yield tally.result()
        behind = self._behind()
        for number, batch in enumerate(self.batches):
            if behind.groups:
                with self._watching(behind, batch)(None):
                    self.chain.logits(batch, path.states[number].load())
            behind.units += len(self.chain.task.unit_labels(batch))
            advance()
        yield behind.result()

    def _backward_parts(self, path: BlockPath, advance: Advance) -> Iterator[Statistics]:
        entered: dict[str, list[Spooled]] = {}
        for block in self.chain.blocks:
            entered[block.name] = list(path.states)
            for number in range(len(self.batches)):
                path.advance(block.name, number)
                advance()
        behind, gradients = self._behind(), []
        for number, batch in enumerate(self.batches):
            gradients.append(self.spool.keep(self._loss_gradient(behind, batch, path.states[number].load())))
            advance()
        yield behind.result()
        for block in reversed(self.chain.blocks):
            tally, path.states = self.tally_of(block.layers), entered.pop(block.name)
            tally.units = behind.units
            for number, batch in enumerate(self.batches):
                gradient = gradients[number].load()
                gradient = path.backward(block.name, number, gradient, self._watching(tally, batch))
                gradients[number] = self.spool.keep(gradient)
                advance()
            yield tally.result()

    def _behind(self) -> Tally:
        """Return an empty tally for the selected layers behind the last block."""
        in_blocks = {name for block in self.chain.blocks for name in block.layers}
        return self.tally_of([name for name in self.layers if name not in in_blocks])

    def _watching(self, tally: Tally, batch: Batch) -> Watching:
        """Let the tally watch its layers on this batch."""
        layers = {name: self.layers[name] for name in tally.groups}
        return partial(tally.watching, self.chain.task, batch, layers, self.labels_of is not None)

    def _loss_gradient(self, tally: Tally, batch: Batch, final: Tensor) -> Tensor:
        """Return the gradient of the summed loss at the hidden states after the last block, scaled by the tally.

        The logits are computed in pieces, since those of a whole batch may be larger than all else together.
        """
        assert self.labels_of is not None
        task, gradient = self.chain.task, torch.zeros_like(final)
        # Rows that belong to two pieces would be counted twice.
        pieces = self.chain.pieces(batch, *final.shape[:2]) if not tally.groups else [(slice(None), batch)]
        for positions, part in pieces:
            leaf = final[:, positions].detach().clone().requires_grad_()
            with torch.enable_grad(), self._watching(tally, part)(None):
                unit_logits = task.unit_logits(self.chain.logits(part, leaf), part)
                loss = nn.functional.cross_entropy(
                    unit_logits.float(), self.labels_of(unit_logits, part), reduction="sum"
                )
                (tally.loss_scale * loss).backward()
            tally.units += unit_logits.shape[0]
            if leaf.grad is not None:
                gradient[:, positions] += leaf.grad
        return gradient
