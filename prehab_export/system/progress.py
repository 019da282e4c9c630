"""Progress: long work is handed a `Progress` and tells it how far it is, whether anybody watches or not."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Adds to the amount done, with a short note on how it goes."""

    def __call__(self, amount: int = 1, note: str = "") -> None: ...


class Progress(Protocol):
    """Opens the progress of one piece of work: what it is, and how many steps it has; 0 where nobody knows."""

    def __call__(self, what: str, steps: int, /) -> AbstractContextManager[Advance]: ...


@contextmanager
def silent(_what: str, _steps: int) -> Iterator[Advance]:
    """Progress that nobody watches."""
    yield lambda amount=1, note="": None


@contextmanager
def step(advance: Advance, note: str) -> Iterator[None]:
    """One step of a work: its note stands there while it is done, and it counts once it is."""
    advance(0, note)
    yield
    advance(1, note)


def named(progress: Progress, what: str) -> Progress:
    """The same progress under a name of the caller's, which says what the work is for."""
    return lambda _what, steps: progress(what, steps)
