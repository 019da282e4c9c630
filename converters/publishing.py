"""Write files and folders that appear complete or not at all.

They are written beside their destination and moved there once they are finished. After a failure or a kill, the
destination holds what it held before, or nothing. Unfinished work is named ``.<name>.….partial``. A failure removes it;
after a kill, an unfinished folder is removed when the same destination is next written.
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
    """Open a fresh folder to write into, which becomes ``folder`` if the block succeeds.

    Args:
        replace: replace whatever exists at ``folder``; otherwise, only an empty folder may exist there.

    Raises:
        OSError: at the end, something exists at ``folder`` that may not be replaced; at any time, the disk is full.
    """
    folder = folder.absolute()
    with _beside(folder) as work:
        fresh = work / "fresh"  # not the owned folder itself, which other users cannot read
        fresh.mkdir()
        yield fresh
        before = work / "before"
        if folder.exists() or folder.is_symlink():
            if replace:
                os.replace(folder, before)  # moved away in one step: a half-removed folder would look complete
            else:
                folder.rmdir()
        try:
            os.replace(fresh, folder)
        except OSError:  # on Windows, a file in it is open
            if before.exists():
                os.replace(before, folder)
            raise


@contextmanager
def published_files(*files: Path) -> Iterator[Path]:
    """Open a fresh folder to write files into that belong together, each under its own name. If the block succeeds,
    `move_together` moves them to their destinations.

    Args:
        files: the destinations, all in one folder; the last file marks the set as complete.

    Raises:
        OSError: the disk is full, or the last file was not written.
    """
    destinations = [file.absolute() for file in files]
    with _beside(destinations[-1]) as work:
        fresh = work / "fresh"
        fresh.mkdir()
        yield fresh
        move_together(fresh, *destinations)


def move_together(folder: Path, *files: Path) -> None:
    """Move files that belong together from a folder on the same disk to their destinations.

    The last file is moved last, and never exists beside files of another set. If one of the others is not in the
    folder, it is removed from its destination, too.

    Raises:
        OSError: the last file is not in the folder.
    """
    *others, last = files
    if any(path.exists() for other in others for path in (other, folder / other.name)):
        last.unlink(missing_ok=True)
    for other in others:
        if (folder / other.name).exists():
            os.replace(folder / other.name, other)
        else:
            other.unlink(missing_ok=True)
    os.replace(folder / last.name, last)


def publish_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; the file then holds either all of the text or what it held before.

    Raises:
        OSError: the disk is full, or there is no such folder.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")  # other processes may write the same file
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _beside(destination: Path) -> Iterator[Path]:
    """A temporary folder of this process beside a destination."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    work = OwnedFolder.make(destination.parent, f".{destination.name}.", PARTIAL)
    try:
        yield work.path
    finally:
        work.remove()
