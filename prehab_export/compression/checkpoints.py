"""Saves where a walk over a model's blocks has come to, so that it goes on there after a kill.

A walk writes its results part by part, one part for each block. What it needs besides these to begin with a later block
are the states of the sample there. They are as large as what flows between two blocks, so they are saved only if a
minute has passed since the last time: short walks never save them, long ones after every block.

Processes that work together save the states of their shares of the sample, each in a file of its own. The same number
of processes can go on from there; another number begins the walk anew.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from converters.publishing import published_files
from prehab_export.inputs import Batch
from prehab_export.system import team

# Seconds between two checkpoints.
INTERVAL = 60.0
_FILE = "checkpoint-{rank}-of-{size}.safetensors"
_FACTS = "checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A point that a walk has come to.

    parts: number of parts that were complete.
    tensors: the states of the sample, by name.
    facts: anything else, as JSON types.
    """

    parts: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class Checkpoints:
    """Saves the checkpoints of one walk, each in place of the last, in the folder of its results.

    found: the checkpoint that a killed process left; None if there is none that can be read, or one of other batches,
        or if processes that work together have not all come to the same point. All else about the work must be the
        same.

    Args (when created):
        folder: the folder of the results.
        batches: the sample.
    """

    def __init__(self, folder: Path, batches: Sequence[Batch]) -> None:
        self.path = folder / _FILE.format(rank=team().rank, size=team().size)
        self._shapes = [list(next(iter(batch.values())).shape) for batch in batches]
        found = self._load()
        parts = team().from_each(None if found is None else found.parts)
        self.found = found if len(set(parts)) == 1 else None
        self._latest = time.monotonic()

    def _load(self) -> Checkpoint | None:
        try:
            with safe_open(self.path, framework="pt") as file:
                facts = json.loads(file.metadata()[_FACTS])
                if facts.pop("shapes") != self._shapes:
                    return None
                # Copies, since the file is replaced while the walk goes on.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        return Checkpoint(facts.pop("parts"), tensors, facts)

    def save(self, parts: int, state: Callable[[], Mapping[str, Tensor]], **facts: Any) -> None:
        """Save a checkpoint if it is time.

        Args:
            parts: number of parts that are complete.
            state: returns the states of the sample.
            facts: anything else to save, as JSON types.
        """
        if not team().from_first(time.monotonic() - self._latest >= INTERVAL):
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state().items()}
        save_beside(tensors, self.path, {_FACTS: json.dumps({"parts": parts, "shapes": self._shapes, **facts})})
        self._latest = time.monotonic()

    def remove(self) -> None:
        """Remove the checkpoint: the walk is complete."""
        self.path.unlink(missing_ok=True)


def save_beside(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that appears complete or not at all, in a folder that is created if need be.

    Raises:
        OSError: the disk is full or cannot be written to.
    """
    with published_files(path) as fresh:
        save_file(dict(tensors), fresh / path.name, metadata=dict(metadata))
