"""Define the errors with an exit code beside those of `converters.errors`, and recognise a full disk.

Any other error that reaches the user is a bug and ends with exit code 1.
"""

import errno
import os
from collections.abc import Iterator

# Error numbers of a file system that has no more room (or no more for this user), then of one that cannot be written.
_FULL = tuple(number for name in ("ENOSPC", "EDQUOT") if (number := getattr(errno, name, None)) is not None)
_OUT_OF_SPACE = (*_FULL, errno.EFBIG, errno.EROFS, errno.EIO)


class ParityError(RuntimeError):
    """A written artifact does not compute what the model in memory does; nothing was published."""

    exit_code = 3


class BudgetError(RuntimeError):
    """All work is done, but the result exceeds the requested budget."""

    exit_code = 4


class TargetError(RuntimeError):
    """The target to measure at cannot be reached, lacks something, or was lost during the work."""

    exit_code = 5


class StorageError(RuntimeError):
    """The disk became full or failed during the work; what was finished before is kept."""

    exit_code = 6


class ProcessError(RuntimeError):
    """Another process that shares in the work has ended or cannot be reached; what was finished before is kept."""

    exit_code = 7


def out_of_space(error: BaseException, reasons: tuple[int, ...] = _OUT_OF_SPACE) -> str | None:
    """Return the file system's message if an error, or one of its causes, is that no more can be written; else None.

    Libraries that write from other languages (safetensors, Arrow) pass the system's message on as text only.
    """
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno in reasons:
            return os.strerror(cause.errno) + (f" ({cause.filename})" if cause.filename else "")
        for number in reasons:
            if os.strerror(number) in str(cause):
                return os.strerror(number)
    return None


def is_full(error: BaseException) -> bool:
    """Whether an error, or one of its causes, is a full disk or an exhausted quota."""
    return out_of_space(error, _FULL) is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, each once."""
    yielded: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in yielded:
        yielded.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
