"""Write, link, replace, read and remove the files of a run, check disk space, and locate the cache folder."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from converters.errors import InputError
from converters.onnx.modes import DATA_SUFFIX
from converters.publishing import publish_text, published_folder
from prehab_export.system.errors import StorageError, out_of_space

# The end of the names of files with external weights.
EXTERNAL_WEIGHTS = f".onnx{DATA_SUFFIX}"


def cache_folder() -> Path:
    """Return this program's folder for files that later runs can reuse, in the system's usual place: on Linux in
    XDG_CACHE_HOME, if that is an absolute path, or else in ``~/.cache``."""
    return user_cache_path("prehab-export", appauthor=False)


def write_json(path: Path, value: Any) -> None:
    """Write a value of JSON types; the file then holds either all of it or what it held before."""
    publish_text(path, json.dumps(value, indent=2) + "\n")


def link(source: str, target: str) -> None:
    """Link ``target`` to the file ``source`` by a hard link, or copy it if the file system has no hard links.

    Symbolic links are followed. External weights of a graph are always copied: onnx refuses to read a file that has a
    second name, since it could be any file on the system.
    """
    if source.endswith(EXTERNAL_WEIGHTS):
        shutil.copy2(source, target)
        return
    try:
        Path(target).hardlink_to(os.path.realpath(source))
    except OSError:
        shutil.copy2(source, target)


def free_space(folder: Path) -> int:
    """Return the number of free bytes on the file system of a folder, which need not exist yet."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def check_disk_space(folder: Path, needed: int) -> None:
    """Check that the file system of ``folder`` has ``needed`` bytes free.

    Raises:
        InputError: it has less.
    """
    free_bytes = free_space(folder)
    if free_bytes < needed:
        raise InputError(
            f"{folder} needs about {needed / 1e9:.1f} GB more, but only {free_bytes / 1e9:.1f} GB are free; free some "
            f"space (`prehab-export clean {folder}` removes results of earlier options), or name a folder on another "
            "disk with -o"
        )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Open a fresh folder to write into, which replaces ``folder`` if the block succeeds.

    Raises:
        StorageError: the disk is full or fails.
    """
    try:
        with published_folder(folder, replace=True) as fresh:
            yield fresh
    except BaseException as error:
        if (reason := out_of_space(error)) is not None:
            raise StorageError(
                f"cannot go on with {folder}: {reason}; nothing half-written is left. "
                f"Free some space{_or_temporary(folder)}; the same command then continues from here"
            ) from error
        raise


def _or_temporary(folder: Path) -> str:
    """The places that may lack space, if temporary files are on another disk: the error does not say which is full."""
    temporary = Path(tempfile.gettempdir())
    return "" if temporary.stat().st_dev == folder.parent.stat().st_dev else f" there or in {temporary}"


def same_content(shown: Path, source: Path) -> bool:
    """Whether ``shown`` is ``source`` under another name: a hard link, or a copy with the same size and time."""
    if not (shown.is_file() and source.is_file()):
        return False
    shown_facts, source_facts = shown.stat(), source.stat()
    if os.path.samestat(shown_facts, source_facts):
        return True
    return (shown_facts.st_size, shown_facts.st_mtime_ns) == (source_facts.st_size, source_facts.st_mtime_ns)


def remove(path: Path) -> None:
    """Remove a file or a folder with everything in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read a JSON file; None if there is none, or if it is damaged, as after a power failure."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
