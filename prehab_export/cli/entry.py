"""The program's entry: errors that a user can mend become one sentence and an exit code."""

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from converters.errors import InputError
from prehab_export.cli.commands import cli
from prehab_export.system import BudgetError, ParityError, StorageError, TargetError, is_full, out_of_space


def main(arguments: list[str] | None = None) -> None:
    """Run a command line, of this process when none is given; ends the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that the terminal lacks is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        with _tidy_ends():
            code = cli.main(args=arguments, prog_name="prehab-export", standalone_mode=False)
    except InputError as error:  # what cannot be read for want of room is no fault of the input
        advice = "; free some space, then the same command goes on" if is_full(error) else ""
        click.echo(f"error: {error}{advice}", err=True)
        code = StorageError.exit_code if is_full(error) else error.exit_code
    except (ParityError, BudgetError, TargetError, StorageError) as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except FloatingPointError as error:  # a loss that overflowed, with what to change
        click.echo(f"error: {error}", err=True)
        code = InputError.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command again to go on", err=True)
        code = 130
    except Exception as error:
        if (reason := out_of_space(error)) is None:
            raise
        click.echo(f"error: {reason}; free some space, then the same command goes on", err=True)
        code = StorageError.exit_code
    sys.exit(code or 0)


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _tidy_ends() -> Iterator[None]:
    """A polite kill, or a terminal that is closed, unwinds as an error does: what was started is ended, what is half
    written is taken away. Whoever has these signals ignored, as nohup does, keeps that."""
    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    numbers = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
