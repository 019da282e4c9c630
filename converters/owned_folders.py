"""Folders that last no longer than the process that made them, however it ends.

In each lies a lock that its owner holds. The system gives up a lock with the process that holds it: a folder whose lock
is free belongs to nobody, and goes when the next one of its name is made.
"""

import glob
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = "owner.lock"
_TRIES = 5


@dataclass(frozen=True)
class OwnedFolder:
    """A folder that nobody but this process looks into or takes away."""

    path: Path
    _lock: FileLock
    _owner: int

    @classmethod
    def make(cls, parent: Path, prefix: str, suffix: str = "") -> "OwnedFolder":
        """One named ``<prefix>…<suffix>``; those of such names whose owners are gone are removed first."""
        for abandoned in parent.glob(f"{glob.escape(prefix)}*{glob.escape(suffix)}"):
            _remove_unless_owned(abandoned)
        for _ in range(_TRIES):
            folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix, suffix=suffix))
            lock = _lock_in(folder)
            try:
                lock.acquire(timeout=0)
            except Timeout:  # another process looked for an owner just here, and takes the folder away
                continue
            except OSError:  # a file system without locks: nobody takes anything away there
                break
            if (folder / LOCK).is_file():
                break
        return cls(folder, lock, os.getpid())

    def remove(self) -> None:
        """Take the folder away with all that is in it; in a fork of its owner, do nothing."""
        if os.getpid() == self._owner:
            _remove(self.path, self._lock)


def _lock_in(folder: Path) -> FileLock:
    return FileLock(folder / LOCK, thread_local=False)  # whichever thread ends it


def _remove_unless_owned(folder: Path) -> None:
    with suppress(Timeout, OSError):
        if not _is_ours(folder) or not (folder / LOCK).is_file():
            return
        lock = _lock_in(folder)
        lock.acquire(timeout=0)
        _remove(folder, lock)


def _is_ours(folder: Path) -> bool:
    return not folder.is_symlink() and (not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid())


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    shutil.rmtree(folder, ignore_errors=True)  # where an open file cannot be taken away
