"""The entry point of the program. It turns errors that a user can fix into one sentence and an exit code."""

import atexit
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from converters.errors import InputError
from prehab_export.cli.commands import cli
from prehab_export.system import (
    BudgetError,
    ParityError,
    ProcessError,
    StorageError,
    TargetError,
    everyone,
    in_step,
    is_full,
    join_processes,
    keep_freed_memory,
    launched_processes,
    leave_processes,
    out_of_space,
)

# The exit code after SIGTERM, which a launcher sends to all processes when one of them has ended.
TERMINATED = 128 + signal.SIGTERM
FULL_DISK_ADVICE = "free some space and run the same command again to continue"


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and end the process with its exit code.

    Args:
        arguments: the command line; None means the arguments of this process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal cannot encode is not an error
            stream.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    try:
        with _clean_exit_on_signals():
            code = _run_command(arguments) if launched_processes() == 1 else _run_in_step(arguments)
    except InputError as error:  # a full disk can look like an unreadable input
        advice = f"; {FULL_DISK_ADVICE}" if is_full(error) else ""
        _report(f"error: {error}{advice}")
        code = StorageError.exit_code if is_full(error) else error.exit_code
    except (ParityError, BudgetError, TargetError, StorageError, ProcessError) as error:
        _report(f"error: {error}")
        code = error.exit_code
    except FloatingPointError as error:  # a loss overflowed; the message says what to change
        _report(f"error: {error}")
        code = InputError.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except SystemExit as stop:
        if stop.code == TERMINATED and everyone().size > 1:
            _report(
                "terminated, perhaps because another process of this run has ended; run the command again to continue"
            )
        raise
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command again to continue", err=True)
        code = 130
    except Exception as error:
        if (reason := out_of_space(error)) is None:
            raise
        _report(f"error: {reason}; {FULL_DISK_ADVICE}")
        code = StorageError.exit_code
    if launched_processes() > 1:
        _end_at_once(code or 0)
    sys.exit(code or 0)


def _end_at_once(code: int) -> None:
    """End one of several processes: what Python has to do at exit is done, but no object of C++ is destroyed.

    Threads of the connection to other processes may still run. If their objects are destroyed, the process is aborted
    after all of its work is done.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_command(arguments: list[str] | None) -> Any:
    return cli.main(args=arguments, prog_name="prehab-export", standalone_mode=False)


def _run_in_step(arguments: list[str] | None) -> Any:
    """Run the command in the first of several processes, and let the others share in its work."""
    from prehab_export.pipeline import dismiss_processes, follow_first_process

    if not join_processes().leads:
        follow_first_process()
        code = 0
    else:
        try:
            code = _run_command(arguments)
        finally:
            if in_step():
                dismiss_processes()
    leave_processes()
    return code


def _report(message: str) -> None:
    """Print why this process ends; the first one of several is the one that the user has to do with."""
    rank = everyone().rank
    click.echo(f"process {rank}: {message}" if rank else message, err=True)


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
