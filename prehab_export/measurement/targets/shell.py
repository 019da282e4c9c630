"""Other machines as a shell that runs a line and moves a file: over ssh as OpenSSH has it, or over adb."""

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
from prehab_export.measurement.targets.watched import Watch, finish
from prehab_export.system import TargetError, environment, find_program

# What ssh returns for its own failures, whatever the command returned.
_SSH_FAILED = 255

_SSH_OPTIONS = (
    "BatchMode=yes",  # a question that nobody sees is a hang
    "ConnectTimeout=15",
    "ServerAliveInterval=10",
    "ServerAliveCountMax=3",
)


@dataclass(frozen=True)
class Shell:
    """A machine that can be told things.

    prefix: what stands before a shell line. lost: the exit code that means that the connection failed, not the line.
    push, pull: ``(source, destination)`` → the command that copies a local file there, and one from there; None to send
    files through the shell itself. home: the folder to keep kits in.
    """

    name: str
    prefix: tuple[str, ...]
    home: str
    lost: int | None = None
    push: Callable[[str, str], list[str]] | None = None
    pull: Callable[[str, str], list[str]] | None = None

    def run(self, line: str, watch: Watch | None = None) -> tuple[int, str, str]:
        """Run a shell line there, its stdin held open until it ends; returns exit code, stdout and stderr.

        Args:
            watch: called with each line of stderr as it comes; what it raises ends the command and is raised here.

        Raises:
            TargetError: the connection could not be made, or was lost.
        """
        process = subprocess.Popen(
            # The shell there stays, so that a signal which ends the command comes back as a code of its own.
            [*self.prefix, f"{line}; exit $?"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment(),
        )
        output, errors = finish(process, watch)  # a runner there ends when its stdin closes, which this end's is then
        return self._judged(process.returncode, output, errors)

    def put(self, source: Path, destination: str) -> None:
        """Copy a file there; it appears under its name when it is complete.

        Raises:
            TargetError: it could not be written, or the connection was lost.
        """
        part, place = shlex.quote(f"{destination}.part"), shlex.quote(destination)
        if self.push is not None:
            done = _done(self.push(str(source), f"{destination}.part"))
        else:
            with source.open("rb") as file:
                line = [*self.prefix, f"cat > {part}"]
                done = _done(line, stdin=file)
        self._expect(self._judged(done.returncode, "", done.stderr), f"{source.name} could not be copied")
        self._expect(self.run(f"mv {part} {place}"), f"{source.name} could not be copied")

    def get(self, source: str, destination: Path) -> None:
        """Raises:
        TargetError: it is not there, or the connection was lost.
        """
        if self.pull is not None:
            done = _done(self.pull(source, str(destination)))
            self._expect(self._judged(done.returncode, "", done.stderr), f"{source} could not be fetched")
            return
        code, output, errors = self.run(f"cat {shlex.quote(source)}")
        self._expect((code, output, errors), f"{source} could not be fetched")
        destination.write_text(output, encoding="utf-8")

    def _judged(self, code: int, output: str, errors: str) -> tuple[int, str, str]:
        unplugged = self.push is not None and code != 0 and any(text in errors.lower() for text in _UNPLUGGED)
        if code == self.lost or unplugged:
            raise TargetError(f"{self.name}: {_reason(errors)}")
        return code, output, errors

    def _expect(self, answer: tuple[int, str, str], what: str) -> None:
        code, _, errors = answer
        if code != 0:
            raise TargetError(f"{self.name}: {what}: {_last_line(errors) or f'exit code {code}'}")


def _done(command: Sequence[str], stdin: IO[bytes] | int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    """A command of this machine that has ended, with what it said."""
    return subprocess.run(
        command, stdin=stdin, capture_output=True, encoding="utf-8", errors="replace", env=environment()
    )


# What ssh says → what to tell the user to do about it.
_REASONS = (
    ("could not resolve", "the host is unknown; check the name, or ~/.ssh/config"),
    ("connection refused", "nothing listens there; check the port, and that sshd runs"),
    ("timed out", "the host does not answer; check the address and the network"),
    ("no route to host", "the host cannot be reached; check the network"),
    ("network is unreachable", "the host cannot be reached; check the network"),
    ("host key verification failed", "its host key is unknown or has changed; connect once by hand with ssh"),
    ("permission denied", "it refuses the login; set up a key that ssh can use without a password"),
    ("too many authentication failures", "it refuses the login; name the key in ~/.ssh/config"),
)


# What adb says of a device that is gone.
_UNPLUGGED = ("device offline", "device not found", "no devices", "device still connecting")


def _reason(errors: str) -> str:
    for text, advice in _REASONS:
        if (line := next((line for line in errors.splitlines() if text in line.lower()), None)) is not None:
            return f"{line.strip()}: {advice}"
    return "the connection was lost"


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


@contextmanager
def ssh(url: str, options: Sequence[str] = ()) -> Iterator[Shell]:
    """``ssh://user@host:port``, with keys and settings as OpenSSH has them; one connection serves everything.

    Args:
        options: further ``-o`` options.

    Raises:
        InputError: not such an address, or there is no ssh here.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise InputError(f"{url}: {error}") from error
    # As written: names in ~/.ssh/config have capitals, which ``hostname`` has not.
    user, _, place = parts.netloc.rpartition("@")
    name = place.removesuffix(f":{port}") if port else place
    wrong = parts.scheme != "ssh" or not name or parts.path not in ("", "/") or parts.password
    if wrong or name.startswith("-") or user.startswith("-"):  # ssh would take a dash for an option
        raise InputError(f"{url} is no address such as ssh://user@host or ssh://host:2222")
    program = find_program("ssh")
    if program is None:
        raise InputError("there is no ssh here; install OpenSSH's client")
    host = f"{user}@{name}" if user else name
    with tempfile.TemporaryDirectory(prefix="px-") as folder:
        shared = ["ControlMaster=auto", f"ControlPath={folder}/s", "ControlPersist=30"]
        own = [*(shared if os.name == "posix" else []), *_SSH_OPTIONS, *options]  # Windows' ssh has no such socket
        base = [program, *(["-p", str(port)] if port else []), *(part for option in own for part in ("-o", option))]
        try:
            yield Shell(host, (*base, "--", host), ".cache/prehab-export/kits", lost=_SSH_FAILED)
        finally:
            if os.name == "posix":
                _done([*base, "-O", "exit", "--", host])


@contextmanager
def adb(serial: str | None) -> Iterator[Shell]:
    """A device that adb knows; the only one when no serial number is given.

    Raises:
        InputError: there is no adb here.
        TargetError: no such device is connected and allowed.
    """
    program = find_program("adb")
    if program is None:
        raise InputError("there is no adb here; install Android's platform tools and allow USB debugging")
    base = [program, *([] if serial is None else ["-s", serial])]
    state = _done([*base, "get-state"])
    if state.returncode != 0 or state.stdout.strip() != "device":
        said = _last_line(state.stderr) or state.stdout.strip()
        raise TargetError(f"adb reaches no device: {said}; connect it and allow debugging")
    yield Shell(
        serial or "the device",
        (*base, "shell"),
        "/data/local/tmp/prehab-export",
        push=lambda source, destination: [*base, "push", source, destination],
        pull=lambda source, destination: [*base, "pull", source, destination],
    )
