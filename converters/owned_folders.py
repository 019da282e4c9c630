"""Make temporary folders that do not outlast their process for long, however it ends.

Each folder contains a lock file that its owner keeps locked. The system releases the lock when the owner ends. A folder
with a free lock has no owner any more, and is removed when the next folder of that name is made.
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
    """A folder that only this process uses and removes."""

    path: Path
    _lock: FileLock
    _owner: int

    @classmethod
    def make(cls, parent: Path, prefix: str, suffix: str = "") -> "OwnedFolder":
        """Make a folder named ``<prefix>…<suffix>``, after removing those with such names whose owners have ended."""
        for abandoned in parent.glob(f"{glob.escape(prefix)}*{glob.escape(suffix)}"):
            _remove_unless_owned(abandoned)
        for _ in range(_TRIES):
            folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix, suffix=suffix))
            lock = _lock_in(folder)
            try:
                lock.acquire(timeout=0)
            except Timeout:  # another process found no owner at this very moment, and removes the folder
                continue
            except OSError:  # the file system has no locks, so no process removes another's folder there
                break
            if (folder / LOCK).is_file():
                break
        return cls(folder, lock, os.getpid())

    def remove(self) -> None:
        """Remove the folder with everything in it; does nothing in a fork of the owner."""
        if os.getpid() == self._owner:
            _remove(self.path, self._lock)


def _lock_in(folder: Path) -> FileLock:
    return FileLock(folder / LOCK, thread_local=False)  # another thread may release it


def _remove_unless_owned(folder: Path) -> None:
    with suppress(Timeout, OSError):
        if not _belongs_to_user(folder) or not (folder / LOCK).is_file():
            return
        lock = _lock_in(folder)
        lock.acquire(timeout=0)
        _remove(folder, lock)


def _belongs_to_user(folder: Path) -> bool:
    """Whether this user owns the folder, and it is no link to another place."""
    return not folder.is_symlink() and (not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid())


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    shutil.rmtree(folder, ignore_errors=True)  # again, where the open lock file could not be removed
