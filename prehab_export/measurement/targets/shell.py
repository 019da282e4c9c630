"""Shells of other machines, over OpenSSH or adb, that run commands and copy files."""

import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from converters.errors import InputError
from prehab_export.measurement.targets.process_output import Watch, collect_output
from prehab_export.system import TargetError, environment, find_program

# The exit code of ssh for its own failures.
_SSH_FAILED = 255

_SSH_OPTIONS = (
    "BatchMode=yes",  # a prompt would wait forever, because nobody sees it
    "ConnectTimeout=15",
    "ServerAliveInterval=10",
    "ServerAliveCountMax=3",
)


@dataclass(frozen=True)
class Shell:
    """A shell of another machine.

    name: name of the machine, for messages.
    prefix: local command that runs a shell line on the machine.
    home: folder on the machine for kits.
    lost: exit code that means that the connection failed; None if no code does.
    push: ``(source, destination)`` → local command that copies a file to the machine; None to use the shell.
    pull: ``(source, destination)`` → local command that copies a file from the machine; None as for push.
    """

    name: str
    prefix: tuple[str, ...]
    home: str
    lost: int | None = None
    push: Callable[[str, str], list[str]] | None = None
    pull: Callable[[str, str], list[str]] | None = None

    def run(self, line: str, watch: Watch | None = None) -> tuple[int, str, str]:
        """Run a shell line on the machine and return its exit code, stdout and stderr.

        The stdin of the line stays open until it ends.

        Args:
            watch: called with each line of stderr when it arrives. An exception from it ends the command and is raised
                again.

        Raises:
            TargetError: the connection failed or was lost.
        """
        process = subprocess.Popen(
            # Without the explicit exit, the remote shell replaces itself by the command, and a signal that kills the
            # command does not become an exit code.
            [*self.prefix, f"{line}; exit $?"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment(),
        )
        # If this raises, it closes stdin, and the runner on the machine ends with its stdin.
        output, errors = collect_output(process, watch)
        return self._check_connection(process.returncode, output, errors)

    def put(self, source: Path, destination: str) -> None:
        """Copy a local file to the machine. It has its final name only once it is complete.

        Raises:
            TargetError: the file could not be written, or the connection was lost.
        """
        part, final = shlex.quote(f"{destination}.part"), shlex.quote(destination)
        if self.push is not None:
            result = _run_locally(self.push(str(source), f"{destination}.part"))
        else:
            with source.open("rb") as file:
                result = _run_locally([*self.prefix, f"cat > {part}"], stdin=file)
        failure = f"{source.name} could not be copied"
        self._check_success(self._check_connection(result.returncode, "", result.stderr), failure)
        self._check_success(self.run(f"mv {part} {final}"), failure)

    def get(self, source: str, destination: Path) -> None:
        """Copy a text file from the machine.

        Raises:
            TargetError: the file does not exist, or the connection was lost.
        """
        failure = f"{source} could not be fetched"
        if self.pull is not None:
            result = _run_locally(self.pull(source, str(destination)))
            self._check_success(self._check_connection(result.returncode, "", result.stderr), failure)
            return
        code, output, errors = self.run(f"cat {shlex.quote(source)}")
        self._check_success((code, output, errors), failure)
        destination.write_text(output, encoding="utf-8")

    def _check_connection(self, code: int, output: str, errors: str) -> tuple[int, str, str]:
        """Return the arguments, or raise a `TargetError` if they mean that the connection failed."""
        unplugged = self.push is not None and code != 0 and any(text in errors.lower() for text in _UNPLUGGED)
        if code == self.lost or unplugged:
            raise TargetError(f"{self.name}: {_connection_error(errors)}")
        return code, output, errors

    def _check_success(self, result: tuple[int, str, str], failure: str) -> None:
        code, _, errors = result
        if code != 0:
            raise TargetError(f"{self.name}: {failure}: {_last_line(errors) or f'exit code {code}'}")


def _run_locally(
    command: Sequence[str], stdin: IO[bytes] | int = subprocess.DEVNULL
) -> subprocess.CompletedProcess[str]:
    """Run a command on this machine and capture its output."""
    return subprocess.run(
        command, stdin=stdin, capture_output=True, encoding="utf-8", errors="replace", env=environment()
    )


# Part of an error of ssh → explanation and advice for the user.
_ADVICE = (
    ("could not resolve", "the host is unknown; check the name, or ~/.ssh/config"),
    ("connection refused", "nothing listens there; check the port, and that sshd runs"),
    ("timed out", "the host does not answer; check the address and the network"),
    ("no route to host", "the host cannot be reached; check the network"),
    ("network is unreachable", "the host cannot be reached; check the network"),
    ("host key verification failed", "its host key is unknown or has changed; connect once by hand with ssh"),
    ("permission denied", "it refuses the login; set up a key that ssh can use without a password"),
    ("too many authentication failures", "it refuses the login; name the key in ~/.ssh/config"),
)


# Parts of adb's errors for a device that is no longer connected.
_UNPLUGGED = ("device offline", "device not found", "no devices", "device still connecting")


def _connection_error(errors: str) -> str:
    """Return the line of ssh's errors that explains why the connection failed, with advice."""
    for text, advice in _ADVICE:
        if (line := next((line for line in errors.splitlines() if text in line.lower()), None)) is not None:
            return f"{line.strip()}: {advice}"
    return "the connection was lost"


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


@contextmanager
def ssh(url: str, options: Sequence[str] = ()) -> Iterator[Shell]:
    """Open a shell over ssh, with the keys and settings of OpenSSH. All commands share one connection.

    Args:
        url: address ``ssh://user@host:port``; user and port are optional.
        options: further ``-o`` options.

    Raises:
        InputError: the address is malformed, or this machine has no ssh.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise InputError(f"{url}: {error}") from error
    # ``parts.hostname`` is in lower case, but names in ~/.ssh/config may have capitals.
    user, _, address = parts.netloc.rpartition("@")
    name = address.removesuffix(f":{port}") if port else address
    malformed = parts.scheme != "ssh" or not name or parts.path not in ("", "/") or parts.password
    if malformed or name.startswith("-") or user.startswith("-"):  # ssh would take a dash for an option
        raise InputError(f"{url} is not an address such as ssh://user@host or ssh://host:2222")
    program = find_program("ssh")
    if program is None:
        raise InputError("there is no ssh here; install OpenSSH's client")
    host = f"{user}@{name}" if user else name
    with tempfile.TemporaryDirectory(prefix="px-") as folder:
        sharing = ["ControlMaster=auto", f"ControlPath={folder}/s", "ControlPersist=30"]
        settings = [*(sharing if os.name == "posix" else []), *_SSH_OPTIONS, *options]  # not supported on Windows
        base = [program, *(["-p", str(port)] if port else []), *(part for value in settings for part in ("-o", value))]
        try:
            yield Shell(host, (*base, "--", host), ".cache/prehab-export/kits", lost=_SSH_FAILED)
        finally:
            if os.name == "posix":
                _run_locally([*base, "-O", "exit", "--", host])


@contextmanager
def adb(serial: str | None) -> Iterator[Shell]:
    """Open a shell on an Android device over adb.

    Args:
        serial: serial number of the device; the only connected device when None.

    Raises:
        InputError: this machine has no adb.
        TargetError: the device is not connected, or does not allow debugging.
    """
    program = find_program("adb")
    if program is None:
        raise InputError("there is no adb here; install Android's platform tools and allow USB debugging")
    base = [program, *([] if serial is None else ["-s", serial])]
    state = _run_locally([*base, "get-state"])
    if state.returncode != 0 or state.stdout.strip() != "device":
        reason = _last_line(state.stderr) or state.stdout.strip()
        raise TargetError(f"adb reaches no device: {reason}; connect it and allow debugging")
    yield Shell(
        serial or "the device",
        (*base, "shell"),
        "/data/local/tmp/prehab-export",
        push=lambda source, destination: [*base, "push", source, destination],
        pull=lambda source, destination: [*base, "pull", source, destination],
    )
