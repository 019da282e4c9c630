"""Runs two models side by side, one repeated block at a time: the dense model and the student that is compressed.

Drift-anchored truncation and block-wise refinement both work block by block. They need to know which layers are in
which block, what a block is called with on the calibration sample, and what flows into a layer in both models. Blocks
are run on their own, so a walk over the whole model costs a few forward passes, however deep the model is.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from prehab_export.compression.block_path import BlockPath
from prehab_export.compression.blocks import Block, LayerRun
from prehab_export.compression.chain import Chain
from prehab_export.compression.recording import record_pass
from prehab_export.compression.spool import Spool, Spooled, SpooledRun
from prehab_export.inputs import Batch, device_of, micro_batches, moved
from prehab_export.system import team


class BlockWalk:
    """Keeps the hidden states of both models at the current block, for every batch of the sample.

    The dense block is run first (`run_dense`), which records what its layers read; then the block is observed in the
    student as often as needed, and then left behind by `advance`. The states have the dtypes that blocks pass on in the
    task's precision.

    batches: the sample, in micro-batches; of processes that work together, each one's share of it.

    Args (when created):
        chain: the dense model.
        spool: holds the states.
    """

    def __init__(self, chain: Chain, student: nn.Module, batches: Iterable[Batch], spool: Spool) -> None:
        self.student, self.task = student, chain.task
        self.masks: list[Tensor | None] = []
        self._chain, self._spool = chain, spool
        self._dense, self._student = BlockPath(chain.model, chain.task, spool), BlockPath(student, chain.task, spool)
        # First layer of a group of the current block → records of its runs in the dense model, for every batch.
        self._records: dict[str, list[list[SpooledRun]]] = {}
        device = device_of(chain.model)
        parts = list(micro_batches(batches))
        # If there are too few for all processes, each takes all of them, which changes no mean.
        share = team().share_of(len(parts)) if len(parts) >= team().size else range(len(parts))
        self.batches = [moved(parts[number], device) for number in share]
        for batch in self.batches:
            self._enter(batch)

    @property
    def order(self) -> dict[str, list[str]]:
        """Block → its layers, in the order in which they run."""
        return self._chain.order

    @property
    def dense_states(self) -> list[Spooled]:
        """The dense model's hidden states after the current block, once that has run; one tensor per batch."""
        return self._dense.states

    def _enter(self, batch: Batch) -> None:
        """Take a batch to the first block in both models, and store the arguments of all blocks."""
        recording = self._chain.record(batch)
        memo: dict[int, Any] = {}
        copies = {name: call.separate(memo) for name, call in recording.calls.items()}
        entered = record_pass(self.student, self.task, batch, self._chain.names[:1], stop_early=True).entered[0]
        self.masks.append(self.task.token_mask(batch))
        self._dense.enter(batch, recording.entered[0], recording.calls, recording.numbers)
        self._student.enter(batch, entered, copies, recording.numbers)

    def saved(self) -> dict[str, Tensor]:
        """Return the states of both models as `restore` takes them."""
        sides = {"dense": self._dense, "student": self._student}
        return {f"{side}/{name}": state for side, path in sides.items() for name, state in path.saved().items()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Put the walk back to the block where `saved` was called (see `BlockPath.restore`)."""
        for side, path in (("dense", self._dense), ("student", self._student)):
            states = {name: state for name, state in saved.items() if name.startswith(f"{side}/")}
            path.restore({name.removeprefix(f"{side}/"): state for name, state in states.items()})

    def run_dense(self, block: Block, groups: Sequence[Sequence[str]]) -> None:
        """Run the dense block on every batch, and record these groups of its layers; each group reads one input."""
        self._records = {group[0]: [] for group in groups}
        for number in range(len(self.masks)):
            records = self._dense.advance_recorded(block.name, number, groups)
            for group, runs in zip(groups, records, strict=True):
                kept = _without_unneeded_input(group, runs)
                self._records[group[0]].append([SpooledRun(run, self._spool) for run in kept])

    def observe(
        self, block: Block, names: Sequence[str]
    ) -> Iterator[tuple[list[LayerRun], list[LayerRun], Tensor | None, int]]:
        """Observe a group of layers of the current block in the student, on every batch.

        Yields:
            Runs in the dense model, runs in the student (one record for each time that the layers run), the token mask,
            and the number of positions in the hidden states.
        """
        for number, mask in enumerate(self.masks):
            dense = [run.load() for run in self._records[names[0]][number]]
            writers = dense[0].residuals if len(dense) == 1 else None
            student = self._student.observe(block.name, number, names, writers)
            yield dense, student, mask, self._student.states[number].shape[:-1].numel()

    def finish(self, block: Block, layers: Collection[str]) -> None:
        """Take note that these layers of the student's current block have their final weights."""
        runs = [self._records[group][0] for group in self._records]
        # A module that runs several times, or changes what it is given, is run every time.
        if all(len(records) == 1 for records in runs) and not self._student.calls[0][block.name].mutable:
            self._student.finished.update(block.name, block.layers, layers)

    def output(self, block: Block, number: int) -> Tensor:
        """Return the output of the student's block on the student's states of one batch."""
        return self._student.output(block.name, number)

    def advance(self, block: Block, *, changed: bool = False) -> None:
        """Leave the current block: advance the student's states through its block as it is now.

        Args:
            changed: whether finished layers have changed after all.
        """
        self._records = {}
        if changed:
            self._student.finished.clear()
        for number in range(len(self.masks)):
            self._student.advance(block.name, number)
        self._student.finished.clear()


def _without_unneeded_input(group: Sequence[str], runs: list[LayerRun]) -> list[LayerRun]:
    """Drop the input of layers that all write to a residual stream: their outputs are the targets (see ``drift``)."""
    if len(runs) == 1 and set(group) <= runs[0].outputs.keys():
        runs[0].input = None
    return runs
