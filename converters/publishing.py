"""Files and folders that appear whole or not at all: they are written beside their place and put there once they are
finished. Whatever fails or is killed on the way leaves in the place what was there before, or nothing.

What is unfinished is named ``.<name>.….partial``. After a failure it is gone; after a kill a folder goes when the same
place is written again.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.owned_folders import OwnedFolder

PARTIAL = ".partial"


@contextmanager
def published_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A fresh folder to write into, which becomes ``folder`` if the block succeeds.

    Args:
        replace: put it in the place of whatever lies there; otherwise no more than an empty folder may lie there.

    Raises:
        OSError: at the end, something lies there that is not to be replaced; at any time, the disk is full.
    """
    folder = folder.absolute()
    with _beside(folder) as own:
        fresh = own / "fresh"  # not the owned folder itself, which is closed to others
        fresh.mkdir()
        yield fresh
        before = own / "before"
        if folder.exists() or folder.is_symlink():
            if replace:
                os.replace(folder, before)  # taken out at once: a half of it would look like all of it
            else:
                folder.rmdir()
        try:
            os.replace(fresh, folder)
        except OSError:  # a file in it that is open, on Windows
            if before.exists():
                os.replace(before, folder)
            raise


@contextmanager
def published_files(*files: Path) -> Iterator[Path]:
    """A fresh folder to write files into that belong together, each under its own name; they take their places if the
    block succeeds, as by `move_together`.

    Args:
        files: their places, all in one folder; the last one is what makes them complete.

    Raises:
        OSError: the disk is full, or the last one was not written.
    """
    places = [file.absolute() for file in files]
    with _beside(places[-1]) as own:
        fresh = own / "fresh"
        fresh.mkdir()
        yield fresh
        move_together(fresh, *places)


def move_together(folder: Path, *files: Path) -> None:
    """Take files that belong together out of a folder on the same disk to their places.

    The last one comes last, and never stands beside others that are not its own. Of the others, one that is not in the
    folder is not in its place afterwards either.

    Raises:
        OSError: the last one is not in the folder.
    """
    *others, last = files
    if any(place.exists() for other in others for place in (other, folder / other.name)):
        last.unlink(missing_ok=True)
    for other in others:
        if (folder / other.name).exists():
            os.replace(folder / other.name, other)
        else:
            other.unlink(missing_ok=True)
    os.replace(folder / last.name, last)


def publish_text(path: Path, text: str) -> None:
    """Write a file of text, UTF-8; it holds all of the text or what it held before.

    Raises:
        OSError: the disk is full, or there is no such folder.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")  # others may be writing the same
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A folder of this process's own beside a place."""
    place.parent.mkdir(parents=True, exist_ok=True)
    own = OwnedFolder.make(place.parent, f".{place.name}.", PARTIAL)
    try:
        yield own.path
    finally:
        own.remove()
