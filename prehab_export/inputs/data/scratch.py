"""Where copies of local data lie while this process needs them: gone when it ends, and after a kill with the next one.

A folder of the temporary directory, with a lock in it that its owner holds. The system gives up a lock with the process
that holds it, however that ends: a folder whose lock is free belongs to nobody.
"""

import atexit
import functools
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "prehab-export-data-"
LOCK = "owner.lock"
_TRIES = 5


@functools.cache
def scratch_folder() -> Path:
    """This process's own folder; those of killed ones are swept first."""
    _sweep()
    for _ in range(_TRIES):
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        lock = FileLock(folder / LOCK)
        # Another process may be sweeping just here, before the lock is held: it then has the folder.
        with suppress(Timeout, OSError):
            lock.acquire(timeout=0)
            if (folder / LOCK).is_file():
                break
    # A file system without locks: nobody sweeps there.
    atexit.register(_remove, folder, lock, os.getpid())
    return folder


def _sweep() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(Timeout, OSError):
            if not _is_ours(folder) or not (folder / LOCK).is_file():
                continue
            lock = FileLock(folder / LOCK)
            lock.acquire(timeout=0)
            _remove(folder, lock, os.getpid())


def _is_ours(folder: Path) -> bool:
    return not folder.is_symlink() and (not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid())


def _remove(folder: Path, lock: FileLock, owner: int) -> None:
    if os.getpid() != owner:  # a fork of it ends
        return
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    shutil.rmtree(folder, ignore_errors=True)  # where an open file cannot be taken away
