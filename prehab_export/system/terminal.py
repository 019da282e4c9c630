"""What a long piece of work says of itself, on stderr: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

# Adds to the amount done, with a short note on how it goes.
Advance = Callable[..., None]

_CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class _Literal(Console):
    """A console that shows text as it is: what looks like markup in the name of a file or a device is part of the name,
    and a control character is shown instead of obeyed. Looks are given as ``style``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def printable(text: str) -> str:
    r"""Text with its control characters, line ends and tabs aside, written out.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return text.translate(_CONTROLS)


console = _Literal(stderr=True, soft_wrap=True)


def result_console() -> Console:
    """For results, on stdout: as wide as the terminal, and wide enough for long layer names where there is none."""
    return _Literal() if Console().is_terminal else _Literal(width=160)


def say(text: str, style: str | None = None) -> None:
    """A line on stderr, as it is; ``style`` as in rich: ``bold``, ``dim``, ``yellow``."""
    console.print(text, style=style)


def warn(text: str) -> None:
    say(f"  warning: {text}", style="yellow")


@contextmanager
def bar(description: str, total: int) -> Iterator[Advance]:
    """Progress of ``total`` things. The value is called as ``advance(1, note="loss 0.31")``."""
    description = printable(description)
    if not console.is_terminal:
        with _lines(description, total) as advance:
            yield advance
        return
    columns = (
        TextColumn("  {task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
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
