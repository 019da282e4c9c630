"""The entry point of the program. It turns errors that a user can fix into one sentence and an exit code."""

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from converters.errors import InputError
from prehab_export.cli.commands import cli
from prehab_export.system import BudgetError, ParityError, StorageError, TargetError, is_full, out_of_space

FULL_DISK_ADVICE = "free some space and run the same command again to continue"


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and end the process with its exit code.

    Args:
        arguments: the command line; None means the arguments of this process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal cannot encode is not an error
            stream.reconfigure(errors="backslashreplace")
    try:
        with _clean_exit_on_signals():
            code = cli.main(args=arguments, prog_name="prehab-export", standalone_mode=False)
    except InputError as error:  # a full disk can look like an unreadable input
        advice = f"; {FULL_DISK_ADVICE}" if is_full(error) else ""
        click.echo(f"error: {error}{advice}", err=True)
        code = StorageError.exit_code if is_full(error) else error.exit_code
    except (ParityError, BudgetError, TargetError, StorageError) as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except FloatingPointError as error:  # a loss overflowed; the message says what to change
        click.echo(f"error: {error}", err=True)
        code = InputError.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command again to continue", err=True)
        code = 130
    except Exception as error:
        if (reason := out_of_space(error)) is None:
            raise
        click.echo(f"error: {reason}; {FULL_DISK_ADVICE}", err=True)
        code = StorageError.exit_code
    sys.exit(code or 0)


def _exit_with_signal(number: int, _: object) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _clean_exit_on_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise SystemExit.

    Cleanup then runs as after an error: child processes end and half-written files are removed. A signal that is
    already ignored or handled, as SIGHUP is under nohup, stays so.
    """
    available = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in available if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _exit_with_signal)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
