"""Holds the many tensors of a pass over a model's blocks: in memory up to a limit, and beyond it in temporary files."""

import tempfile
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from converters.owned_folders import OwnedFolder
from prehab_export.compression.blocks import LayerRun
from prehab_export.inputs import MICRO_BATCH_POSITIONS

# Bytes of tensors in memory. More of them would take the place of the blocks and moments that are worked on.
SPOOL_LIMIT = 2**30
PREFIX = ".prehab-export-spool-"
_ENTRY = "tensor"


@dataclass(frozen=True)
class MemoryLimits:
    """What work on a sample holds in memory at once. Moments and factors are the same up to rounding.

    positions: the most positions in a micro-batch, unless one sample has more.
    spool_bytes: bytes of hidden states in memory; the others are in temporary files.
    """

    positions: int = MICRO_BATCH_POSITIONS
    spool_bytes: int = SPOOL_LIMIT


USUAL_LIMITS = MemoryLimits()


class _Files:
    """A temporary folder that is removed with this object or, after a kill, by the next process."""

    def __init__(self, parent: Path) -> None:
        folder = OwnedFolder.make(parent, PREFIX)
        self.path = folder.path
        weakref.finalize(self, folder.remove)


class Spooled:
    """A tensor in a spool. Its memory or its file is freed together with this object."""

    def __init__(self, tensor: Tensor, path: Path | None = None, files: _Files | None = None) -> None:
        self.shape, self._device = tensor.shape, tensor.device
        self._tensor = tensor if path is None else None
        self._path, self._files = path, files  # the folder lives as long as a file in it is needed

    def load(self) -> Tensor:
        """Return the tensor, which must not be changed in place. From a file it is mapped, not read."""
        if self._tensor is not None:
            return self._tensor
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(_ENTRY).to(self._device)


class Spool:
    """Holds tensors in memory, and in files once they take more than ``limit`` bytes together.

    limit: bytes in memory.
    folder: where to create the folder of the files; by default the system's temporary folder.
    """

    def __init__(self, limit: int = SPOOL_LIMIT, folder: Path | None = None) -> None:
        self.limit, self.folder = limit, folder or Path(tempfile.gettempdir())
        self._used = self._count = 0
        self._files: _Files | None = None

    def keep(self, tensor: Tensor) -> Spooled:
        """Take a tensor, which must not be changed in place afterwards."""
        size = tensor.untyped_storage().nbytes()
        if self._used + size <= self.limit:
            self._used += size
            spooled = Spooled(tensor)
            weakref.finalize(spooled, self._release, size)
            return spooled
        self._files = self._files or _Files(self.folder)
        self._count += 1
        path = self._files.path / f"{self._count}.safetensors"
        save_file({_ENTRY: tensor.detach().contiguous()}, path)
        spooled = Spooled(tensor, path, self._files)
        weakref.finalize(spooled, path.unlink, missing_ok=True)
        return spooled

    def _release(self, size: int) -> None:
        self._used -= size


@dataclass(frozen=True)
class Folders:
    """Folders for what does not fit in memory.

    scratch: folder for temporary files; by default the system's.
    save_to: folder to write results to, part by part; they are then mapped from there. If a process that did the same
        work was killed, its folder is completed. By default results stay in memory.
    limits: what fits in memory.
    """

    scratch: Path | None = None
    save_to: Path | None = None
    limits: MemoryLimits = USUAL_LIMITS


def spool_in(folders: Folders) -> Spool:
    """Return an empty spool within the limits."""
    return Spool(folders.limits.spool_bytes, folders.scratch)


class SpooledRun:
    """A `LayerRun` whose tensors are in a spool."""

    def __init__(self, run: LayerRun, spool: Spool) -> None:
        self._rest = replace(run, input=None, residuals={}, outputs={})
        self._input = None if run.input is None else spool.keep(run.input)
        self._residuals = {name: spool.keep(tensor) for name, tensor in run.residuals.items()}
        self._outputs = {name: spool.keep(tensor) for name, tensor in run.outputs.items()}

    def load(self) -> LayerRun:
        """Return the record as it was."""
        return replace(
            self._rest,
            input=None if self._input is None else self._input.load(),
            residuals={name: spooled.load() for name, spooled in self._residuals.items()},
            outputs={name: spooled.load() for name, spooled in self._outputs.items()},
        )
