"""Samples in a fixed order, turned into batches when they are asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from converters.errors import InputError
from prehab_export.inputs.data.encoding import Collate
from prehab_export.inputs.data.source import held_out_count
from prehab_export.inputs.tasks import Batch, Task


@dataclass(frozen=True)
class Samples:
    """Some rows of a split, in order. ``collate`` makes a batch of given rows."""

    rows: np.ndarray
    collate: Collate

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, batch_size: int, indices: Sequence[int] | None = None) -> "Batches":
        """Batches of ``batch_size`` samples, the last one maybe shorter, padded to the longest in each.

        indices: positions in these samples to take, in their order; all of them by default.
        """
        return Batches(self if indices is None else self.at(indices), batch_size)

    def at(self, indices: Sequence[int]) -> "Samples":
        """The samples at these positions, in their order."""
        return Samples(self.rows[np.asarray(indices, np.int64)], self.collate)

    def first(self, count: int) -> "Samples":
        return Samples(self.rows[:count], self.collate)

    def subset(self, count: int, seed: int) -> "Samples":
        """``count`` samples (all, if there are fewer) drawn without repeats, in their old order."""
        return self.split(count, seed)[0]

    def split(self, count: int, seed: int) -> tuple["Samples", "Samples"]:
        """``count`` samples drawn at random, and the rest; both in their old order."""
        order = np.random.default_rng(seed).permutation(len(self.rows))
        drawn, rest = np.sort(order[:count]), np.sort(order[count:])
        return Samples(self.rows[drawn], self.collate), Samples(self.rows[rest], self.collate)


@dataclass(frozen=True)
class Batches:
    """Samples, so many at a time; made one by one, each time they are gone through."""

    samples: Samples
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.samples), self.batch_size):
            yield self.samples.collate(self.samples.rows[start : start + self.batch_size].tolist())


@dataclass(frozen=True)
class TaskData:
    """fingerprint: a hash of the content and of what decides which of it is trained on; evaluation_fingerprint: of
    that, and of what decides which of it judges; description: for the report, with ``warnings`` of what had to be
    assumed."""

    train: Samples
    evaluation: Samples
    fingerprint: str
    evaluation_fingerprint: str
    description: dict[str, Any]


def cut_into_two(samples: Samples, task: Task, seed: int) -> tuple[Samples, Samples]:
    """(train, evaluation) of a lone split; text is cut once, so that evaluation is a text that training never saw."""
    if len(samples) < 2:
        raise InputError("the data has one sample, which cannot be both trained on and judged by; give more")
    count = held_out_count(len(samples))
    if task.name == "text-generation":
        keep = len(samples) - count
        return samples.first(keep), Samples(samples.rows[keep:], samples.collate)
    evaluation, train = samples.split(count, seed)
    return train, evaluation
