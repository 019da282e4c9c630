"""Where copies of local data lie while this process needs them: gone with it, or after a kill with the next one."""

import atexit
import functools
import tempfile
from pathlib import Path

from converters.owned_folders import OwnedFolder

PREFIX = "prehab-export-data-"


@functools.cache
def scratch_folder() -> Path:
    """This process's own folder in the temporary directory."""
    folder = OwnedFolder.make(Path(tempfile.gettempdir()), PREFIX)
    atexit.register(folder.remove)
    return folder.path
