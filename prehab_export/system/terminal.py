"""Print messages, warnings and progress on stderr: a live bar on a terminal, plain lines elsewhere. Results go to
stdout."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from prehab_export.system.progress import Advance, silent

_CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class _Literal(Console):
    """A console that prints text literally. What looks like markup in the name of a file or device is part of the
    name, and control characters are shown, not executed. Formatting is only given by ``style``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def printable(text: str) -> str:
    r"""Write out control characters as escapes, except line ends and tabs.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return text.translate(_CONTROLS)


console = _Literal(stderr=True, soft_wrap=True)


def result_console() -> Console:
    """Return a console for results on stdout: as wide as the terminal, or wide enough for long layer names without
    one."""
    return _Literal() if Console().is_terminal else _Literal(width=160)


def mute() -> None:
    """Print no more messages, warnings and progress: of several processes only the first one does."""
    console.quiet = True


def say(text: str, style: str | None = None) -> None:
    """Print a line on stderr, literally; ``style`` is one of rich's: ``bold``, ``dim``, ``yellow``."""
    console.print(text, style=style)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    say(f"  warning: {text}", style="yellow")


@contextmanager
def bar(what: str, steps: int) -> Iterator[Advance]:
    """Show progress to a person; a `Progress`."""
    what = printable(what)
    if console.quiet:
        with silent(what, steps) as advance:
            yield advance
        return
    if not console.is_terminal:
        with _lines(what, steps) as advance:
            yield advance
        return
    columns = (
        TextColumn("  {task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        # The note takes the space that the other columns leave, and is cut off at its end.
        TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=Column(ratio=1, no_wrap=True)),
    )
    with RichProgress(*columns, console=console, transient=True, expand=True) as progress:
        task = progress.add_task(what, total=steps or None, note="")
        yield lambda amount=1, note="": progress.update(task, advance=amount, note=note)


@contextmanager
def _lines(what: str, steps: int, every_s: float = 15.0) -> Iterator[Advance]:
    """Print a line of progress at most every ``every_s`` seconds."""
    done, last = 0, time.monotonic()

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += amount
        if time.monotonic() - last >= every_s:
            last = time.monotonic()
            amount_done = f"{done} of {steps}" if steps else f"{done}"
            print(f"  {what}: {amount_done} {note}".rstrip(), file=sys.stderr, flush=True)

    yield advance
