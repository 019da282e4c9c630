"""What a long piece of work says of itself, on stderr: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Adds to the amount done, with a short note on how it goes.
Advance = Callable[..., None]

console = Console(stderr=True, highlight=False, soft_wrap=True)


def result_console() -> Console:
    """For results, on stdout: as wide as the terminal, and wide enough for long layer names where there is none."""
    return Console(highlight=False) if Console().is_terminal else Console(highlight=False, width=160)


def say(text: str) -> None:
    console.print(text)


@contextmanager
def bar(description: str, total: int) -> Iterator[Advance]:
    """Progress of ``total`` things. The value is called as ``advance(1, note="loss 0.31")``."""
    if not console.is_terminal:
        with _lines(description, total) as advance:
            yield advance
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total, note="")
        yield lambda amount=1, note="": progress.update(task, advance=amount, note=note)


@contextmanager
def _lines(description: str, total: int, every_s: float = 15.0) -> Iterator[Advance]:
    done, last = 0, time.monotonic()

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += amount
        if time.monotonic() - last >= every_s:
            last = time.monotonic()
            print(f"  {description}: {done} of {total} {note}".rstrip(), file=sys.stderr, flush=True)

    yield advance
