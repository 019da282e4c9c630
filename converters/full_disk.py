"""Some libraries that write files do not look whether they could (onnx's and ONNX Runtime's own code in C++). What they
then fail at is the half of a file that they read back, and nothing in their words tells of the disk.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.errors import InputError

# Less than this is no room.
LEAST_BYTES = 1_000_000


@contextmanager
def told_where_full(folder: Path) -> Iterator[None]:
    """Around such work: an error is told as a full disk if ``folder`` is full by then, or the one of temporary files.

    Raises:
        OSError: with ENOSPC, from the error that it explains.
    """
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        for place in (folder, Path(tempfile.gettempdir())):
            if shutil.disk_usage(place).free < LEAST_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place)) from error
        raise
