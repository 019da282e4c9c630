"""The parent's side of a bench worker: it asks a child process questions in JSON lines, with a time limit."""

import json
import signal
import subprocess
import tempfile
from contextlib import suppress
from threading import Timer
from types import TracebackType
from typing import Any

from converters.errors import InputError
from prehab_export.system import KILLED, environment, python_module

WORKER = "prehab_export.measurement.worker"
_STDERR_TAIL = 2000  # characters, enough for the end of a traceback


class WorkerProcess:
    """A worker process as a context manager that kills the process on exit.

    If the parent is killed, the worker reads the end of its stdin and exits.

    Args:
        name: the model and case, for messages.
        timeout_s: time limit of each answer, in seconds.
        module: the module that the worker runs.
    """

    def __init__(self, name: str, timeout_s: float, module: str = WORKER) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self.timed_out = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  a pipe that is not read would block the worker
        self._process = subprocess.Popen(
            python_module(module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            encoding="utf-8",
            env=environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1"),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._stdin, self._stdout, self._stderr):
            with suppress(BrokenPipeError):  # closing flushes data that a dead worker has not read
                stream.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **question: Any) -> dict[str, Any]:
        """Ask the worker one question and return its answer.

        Raises:
            InputError: the worker answered with an error, was killed, or took longer than ``timeout_s`` seconds.
            RuntimeError: the worker crashed.
        """
        watchdog = Timer(self.timeout_s, self._kill_on_timeout)
        watchdog.daemon = True
        watchdog.start()
        try:
            line = self._exchange(json.dumps(question))
        finally:
            watchdog.cancel()
        if not line.endswith("\n"):
            raise self._exit_error()
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(f"{self.name}: {answer['error']}") from self._stderr_error()
        return answer

    def _exchange(self, question: str) -> str:
        try:
            self._stdin.write(question + "\n")
            self._stdin.flush()
            return self._stdout.readline()
        except BrokenPipeError:  # the worker died before it read the question
            return ""

    def _kill_on_timeout(self) -> None:
        self.timed_out = True
        self._process.kill()

    def _exit_error(self) -> Exception:
        code = self._process.wait()
        if self.timed_out:
            error: Exception = InputError(
                f"{self.name}: no answer within {self.timeout_s:g} s; measure a smaller batch or sequence, "
                "or raise the time limit"
            )
        elif code < 0:
            hint = " (usually because it ran out of memory)" if -code == KILLED else ""
            error = InputError(f"{self.name}: the worker was killed by {signal.Signals(-code).name}{hint}")
        else:
            error = RuntimeError(f"{self.name}: the worker ended with exit code {code} before it answered")
        error.__cause__ = self._stderr_error()
        return error

    def _stderr_error(self) -> RuntimeError | None:
        """Return the end of the worker's stderr as the cause of an error, or None if it wrote nothing."""
        self._stderr.seek(0)
        text = self._stderr.read().decode(errors="replace").strip()
        return RuntimeError(f"the worker wrote:\n{text[-_STDERR_TAIL:]}") if text else None
