"""Provides a temporary folder for copies of local data; it is removed at exit or, after a kill, by the next process."""

import atexit
import functools
import tempfile
from pathlib import Path

from converters.owned_folders import OwnedFolder

PREFIX = "prehab-export-data-"


@functools.cache
def scratch_folder() -> Path:
    """Return this process's own folder in the temporary directory, and create it on the first call."""
    folder = OwnedFolder.make(Path(tempfile.gettempdir()), PREFIX)
    atexit.register(folder.remove)
    return folder.path
