"""Errors with an exit code, beside `converters.errors`. Anything else that escapes is a defect and ends with exit code
1. And how a disk that is full is told from other reasons."""

import errno
import os
from collections.abc import Iterator

# What a file system says when no more can be written, whoever was writing.
_FULL = tuple(number for name in ("ENOSPC", "EDQUOT") if (number := getattr(errno, name, None)) is not None)
_OUT_OF_SPACE = (*_FULL, errno.EFBIG, errno.EROFS, errno.EIO)


class ParityError(RuntimeError):
    """A written artifact does not compute what the model in memory computes; nothing was published."""

    exit_code = 3


class BudgetError(RuntimeError):
    """All is done, but the result is not within what was asked for."""

    exit_code = 4


class TargetError(RuntimeError):
    """The place to measure at cannot be reached, lacks something, or was lost on the way."""

    exit_code = 5


class StorageError(RuntimeError):
    """The disk is full or fails in the middle of the work; what was finished before is kept."""

    exit_code = 6


def out_of_space(error: BaseException, reasons: tuple[int, ...] = _OUT_OF_SPACE) -> str | None:
    """What the file system said, if an error or one of its causes is that nothing more could be written; else None.

    Libraries that write from other languages (safetensors, Arrow) hand the system's words on as text.
    """
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno in reasons:
            return os.strerror(cause.errno) + (f" ({cause.filename})" if cause.filename else "")
        for number in reasons:
            if os.strerror(number) in str(cause):
                return os.strerror(number)
    return None


def is_full(error: BaseException) -> bool:
    """Whether an error or one of its causes is that the disk has no room, or the user none on it."""
    return out_of_space(error, _FULL) is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
