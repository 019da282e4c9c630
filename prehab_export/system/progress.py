"""Progress as a function that does long work knows it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# (what is being done, how many steps it has) → within it, called with the number of steps done.
Progress = Callable[[str, int], AbstractContextManager[Callable[..., None]]]


@contextmanager
def silent(_what: str, _steps: int) -> Iterator[Callable[..., None]]:
    """Progress that nobody watches."""
    yield lambda _done=1: None
