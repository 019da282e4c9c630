"""Report the progress of long work: it takes a `Progress` and reports to it, whether it is displayed or not."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Add to the amount done, with a short note on the state of the work."""

    def __call__(self, amount: int = 1, note: str = "") -> None: ...


class Progress(Protocol):
    """Open the progress of one piece of work: what it is, and its number of steps, or 0 if unknown."""

    def __call__(self, what: str, steps: int, /) -> AbstractContextManager[Advance]: ...


@contextmanager
def silent(_what: str, _steps: int) -> Iterator[Advance]:
    """Progress that is not displayed."""
    yield lambda amount=1, note="": None


@contextmanager
def step(advance: Advance, note: str) -> Iterator[None]:
    """Report one step of a work: its note is displayed while the block runs, and the step counts once it ends."""
    advance(0, note)
    yield
    advance(1, note)


def named(progress: Progress, what: str) -> Progress:
    """Return the same progress under the caller's name, which says what the work is for."""
    return lambda _what, steps: progress(what, steps)
