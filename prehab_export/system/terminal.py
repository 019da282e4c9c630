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
from prehab_export.system.quantities import format_duration

# Without a terminal, seconds between two lines of progress: at least, and if the work takes long for a tenth of it.
LEAST_SECONDS, USUAL_SECONDS = 5.0, 30.0

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
def _lines(what: str, steps: int) -> Iterator[Advance]:
    """Print lines of progress: every tenth of the steps unless they pass quickly, and in between once in a while."""
    start = last = time.monotonic()
    done = tenths = 0

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal done, last, tenths
        done += amount
        now, reached = time.monotonic(), 10 * done // steps if steps else 0
        if now - last >= (LEAST_SECONDS if reached > tenths else USUAL_SECONDS):
            last, tenths = now, reached
            print(f"  {what}: {_state(done, steps, now - start)} {note}".rstrip(), file=sys.stderr, flush=True)

    yield advance


def _state(done: int, steps: int, elapsed: float) -> str:
    """Return what is done and how long the rest will take if it goes on at the average pace so far.

    >>> _state(5, 20, 30.0)
    '5 of 20 (25%) after 30 s, about 90 s left'
    """
    if not steps:
        return f"{done} after {format_duration(elapsed)}"
    left = f", about {format_duration(elapsed / done * (steps - done))} left" if 0 < done < steps else ""
    return f"{done} of {steps} ({100 * done // steps}%) after {format_duration(elapsed)}{left}"
