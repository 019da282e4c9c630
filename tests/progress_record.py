"""A `Progress` that keeps what it is told."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Work:
    """One piece of work: what it is, its steps, how many are done, the notes on the way; whether it was closed."""

    what: str
    steps: int
    done: int = 0
    notes: list[str] = field(default_factory=list)
    closed: bool = False


@dataclass
class ProgressRecord:
    """``watch`` sees each note as it comes, and may raise."""

    watch: Callable[[str], object] = lambda _note: None
    works: list[Work] = field(default_factory=list)

    @contextmanager
    def __call__(self, what: str, steps: int, /) -> Iterator[Callable[..., None]]:
        work = Work(what, steps)
        self.works.append(work)

        def advance(amount: int = 1, note: str = "") -> None:
            work.done += amount
            work.notes.append(note)
            self.watch(note)

        try:
            yield advance
        finally:
            work.closed = True

    @property
    def notes(self) -> list[str]:
        return [note for work in self.works for note in work.notes]

    def check_all_done(self, *expected: str) -> None:
        """Every work was closed, all its steps done; ``expected`` are the works' names in order."""
        assert tuple(work.what for work in self.works) == expected
        for work in self.works:
            assert work.closed, work
            assert work.done == work.steps > 0, work
