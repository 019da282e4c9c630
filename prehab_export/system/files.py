"""The files of a run: shown under two names, replaced whole, read back, taken away; whether there is room; and where
things are kept from one run to the next."""

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

# How the names of files of external weights end.
EXTERNAL_WEIGHTS = f".onnx{DATA_SUFFIX}"


def cache_folder() -> Path:
    """This program's folder for what later runs may use again, where the system keeps such folders: in XDG_CACHE_HOME,
    which must be absolute to count, or ``~/.cache`` on Linux."""
    return user_cache_path("prehab-export", appauthor=False)


def write_json(path: Path, value: Any) -> None:
    """Write a value of JSON types; the file holds all of it or what it held before."""
    publish_text(path, json.dumps(value, indent=2) + "\n")


def link(source: str, target: str) -> None:
    """Copy a file as a hard link, where the file system has them; of a symbolic link, the file that it leads to.
    External weights of a graph are copied in full: onnx reads none that have another name somewhere, since they might
    be anybody's file."""
    if source.endswith(EXTERNAL_WEIGHTS):
        shutil.copy2(source, target)
        return
    try:
        Path(target).hardlink_to(os.path.realpath(source))
    except OSError:
        shutil.copy2(source, target)


def free_space(folder: Path) -> int:
    """Bytes that are free where a folder lies, or would lie."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def check_disk_space(folder: Path, needed: int) -> None:
    """Raises:
    InputError: the file system of ``folder`` has less than ``needed`` bytes free.
    """
    free = free_space(folder)
    if free < needed:
        raise InputError(
            f"{folder} needs about {needed / 1e9:.1f} GB more and {free / 1e9:.1f} GB are free; free some space "
            f"(`prehab-export clean {folder}` takes away results of earlier options), or give a folder on another "
            "disk with -o"
        )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A fresh folder of a run to write into, which takes the place of ``folder`` if the block succeeds.

    Raises:
        StorageError: the disk is full, or fails.
    """
    try:
        with published_folder(folder, replace=True) as fresh:
            yield fresh
    except BaseException as error:
        if (reason := out_of_space(error)) is not None:
            raise StorageError(
                f"cannot go on with {folder}: {reason}; nothing half-written is left. "
                f"Free some space{_where_else(folder)}, then the same command goes on from here"
            ) from error
        raise


def _where_else(folder: Path) -> str:
    """The places that lack room, where temporary files lie on another disk: nobody knows which of the two it was."""
    temporary = Path(tempfile.gettempdir())
    return "" if temporary.stat().st_dev == folder.parent.stat().st_dev else f" there or in {temporary}"


def same_content(shown: Path, source: Path) -> bool:
    """Whether a shown file is the result's: a hard link to it, or a copy with its size and time."""
    if not (shown.is_file() and source.is_file()):
        return False
    ours, theirs = shown.stat(), source.stat()
    if os.path.samestat(ours, theirs):
        return True
    return (ours.st_size, ours.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What we have written there; None where nothing is, or what a machine that lost its power left of it."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
