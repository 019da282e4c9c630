"""Holds samples in a fixed order and makes batches of them on demand."""

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
    """Some rows of a split, in order; ``collate`` makes a batch from a list of row numbers."""

    rows: np.ndarray
    collate: Collate

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, batch_size: int, indices: Sequence[int] | None = None) -> "Batches":
        """Return batches of ``batch_size`` samples, each padded to its longest sample; the last may be smaller.

        Args:
            indices: positions of the samples to use, in this order; by default all of them.
        """
        return Batches(self if indices is None else self.at(indices), batch_size)

    def at(self, indices: Sequence[int]) -> "Samples":
        """Return the samples at these positions, in this order."""
        return Samples(self.rows[np.asarray(indices, np.int64)], self.collate)

    def first(self, count: int) -> "Samples":
        """Return the first ``count`` samples, or all if there are fewer."""
        return Samples(self.rows[:count], self.collate)

    def subset(self, count: int, seed: int) -> "Samples":
        """Draw ``count`` samples (all if there are fewer) without replacement; they keep their order."""
        return self.split(count, seed)[0]

    def split(self, count: int, seed: int) -> tuple["Samples", "Samples"]:
        """Return ``count`` samples drawn at random, and the rest; both keep their order."""
        order = np.random.default_rng(seed).permutation(len(self.rows))
        drawn, rest = np.sort(order[:count]), np.sort(order[count:])
        return Samples(self.rows[drawn], self.collate), Samples(self.rows[rest], self.collate)


@dataclass(frozen=True)
class Batches:
    """An iterable of batches of samples; every iteration makes the batches anew, one at a time."""

    samples: Samples
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.samples), self.batch_size):
            yield self.samples.collate(self.samples.rows[start : start + self.batch_size].tolist())


@dataclass(frozen=True)
class TaskData:
    """Samples to train on and samples to evaluate on.

    fingerprint: hash of the content and of all settings that determine the training samples.
    evaluation_fingerprint: hash of ``fingerprint`` and of all settings that determine the evaluation samples.
    description: entries for the report; its ``warnings`` list what had to be assumed about the data.
    """

    train: Samples
    evaluation: Samples
    fingerprint: str
    evaluation_fingerprint: str
    description: dict[str, Any]


def cut_into_two(samples: Samples, task: Task, seed: int) -> tuple[Samples, Samples]:
    """Divide the only split of a dataset into (train, evaluation).

    A language model's text is cut at one place, so that the evaluation text never occurs in training.

    Raises:
        InputError: there is only one sample.
    """
    if len(samples) < 2:
        raise InputError("the data has one sample, which cannot serve both training and evaluation; give more")
    count = held_out_count(len(samples))
    if task.name == "text-generation":
        train_count = len(samples) - count
        return samples.first(train_count), Samples(samples.rows[train_count:], samples.collate)
    evaluation, train = samples.split(count, seed)
    return train, evaluation
