"""Explain errors that a full disk causes in libraries that do not notice it.

Some libraries (the C++ code of onnx and ONNX Runtime) do not check whether their writes succeed. They fail later, when
they read back half a file, and their message does not mention the disk.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.errors import InputError

# With less free space than this, a disk counts as full.
LEAST_BYTES = 1_000_000


@contextmanager
def explaining_full_disk(folder: Path) -> Iterator[None]:
    """Turn an error of the block into that of a full disk, if the disk of ``folder`` or of temporary files is full.

    Raises:
        OSError: ENOSPC, with the error of the block as its cause.
    """
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        for written_folder in (folder, Path(tempfile.gettempdir())):
            if shutil.disk_usage(written_folder).free < LEAST_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(written_folder)) from error
        raise
