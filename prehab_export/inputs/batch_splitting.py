"""Splits batches into parts whose activations are small enough to hold."""

from collections.abc import Iterable, Iterator

from prehab_export.inputs.tasks import Batch, sample_count

# Positions in a part: enough for matrix products to run at full speed. More only takes more memory.
MICRO_BATCH_POSITIONS = 2048
# Positions of an image are counted as patches of this size, the usual one.
_PATCH = 16


def micro_batches(batches: Iterable[Batch], limit: int = MICRO_BATCH_POSITIONS) -> Iterator[Batch]:
    """Split every batch into parts of whole samples, with at most ``limit`` positions unless one sample has more."""
    for batch in batches:
        samples = sample_count(batch)
        size = max(1, limit // positions(batch))
        for start in range(0, samples, size):
            yield {name: value[start : start + size] for name, value in batch.items()}


def positions(batch: Batch) -> int:
    """Return the number of positions of one sample: its tokens, or about as many as an image has patches."""
    shape = next(iter(batch.values())).shape
    return shape[1] if len(shape) == 2 else max(1, shape[-1] * shape[-2] // _PATCH**2)
