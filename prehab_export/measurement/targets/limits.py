"""A child process on some of the cores, with some of the memory.

Where this user may make a cgroup (v2), its ``memory.max`` is the limit that containers have: all memory, file cache
included, and a process beyond it is killed. Elsewhere ``RLIMIT_DATA`` is set: private writable memory only, of which an
allocation beyond it fails (getrlimit(2), Linux 4.7 on). The two do not mean the same, so a result says which.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from converters.errors import InputError
from prehab_export.measurement.targets.watched import Watch, finish
from prehab_export.system import die_with_parent, environment, usable_cores

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limits:
    """cores: those to run on; None for all. memory_mb: 10⁶ bytes; None for no limit.

    Raises:
        InputError: a core that this process may not use, no memory, or a system that has no such limits.
    """

    cores: tuple[int, ...] | None = None
    memory_mb: float | None = None

    def __post_init__(self) -> None:
        if self.memory_mb is not None and not self.memory_mb > 0:
            raise InputError(f"a memory limit of {self.memory_mb} MB leaves nothing to run in")
        if self.memory_mb is not None and resource is None:
            raise InputError("this system cannot limit the memory of a process; measure without --memory-limit")
        if self.cores is not None:
            if not can_pin():
                raise InputError("this system cannot keep a process to some cores; measure without --pin-cores")
            usable = usable_cores()
            if wrong := [core for core in self.cores if core not in usable]:
                raise InputError(f"core {wrong[0]} is not among those of this process: {usable}")


def can_pin() -> bool:
    """Whether this system lets a process be kept to some cores."""
    return hasattr(os, "sched_setaffinity")


@dataclass(frozen=True)
class Ended:
    """How a limited process ended. kind: which limit held (``cgroup`` or ``RLIMIT_DATA``), None without one."""

    code: int
    output: str
    errors: str
    kind: str | None


def run_limited(command: Sequence[str], limits: Limits, watch: Watch | None = None) -> Ended:
    """Run a command within limits, to its end.

    Args:
        watch: called with each line of stderr as it comes; what it raises ends the command and is raised here.
    """
    bind = die_with_parent()
    with _memory_limit(limits.memory_mb) as (kind, enter):

        def prepare() -> None:  # in the child, before the command
            if bind is not None:
                bind()
            if limits.cores is not None:
                os.sched_setaffinity(0, limits.cores)
            enter()

        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                env=environment(),
                preexec_fn=prepare if limits != Limits() else bind,  # Windows takes none
            )
        except subprocess.SubprocessError:  # the limit leaves no room to start in
            return Ended(-9, "", "the process could not start", kind)
        output, errors = finish(process, watch)
    return Ended(process.returncode, output, errors, kind)


@contextmanager
def _memory_limit(megabytes: float | None) -> Iterator[tuple]:
    """What holds, and what a child calls to be held."""
    if megabytes is None:
        yield None, lambda: None
        return
    size = int(megabytes * 1e6)
    group = _new_cgroup(size)
    if group is None:
        yield "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size))
        return
    try:
        yield "cgroup", lambda: (group / "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8")
    finally:
        with suppress(OSError):
            (group / "cgroup.kill").write_text("1", encoding="utf-8")
        with suppress(OSError):
            group.rmdir()


def _new_cgroup(size: int) -> Path | None:
    """A group with this much memory and no swap; None where this user may not make one."""
    try:
        own = next(
            line.partition("::")[2].strip("/")
            for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
            if line.startswith("0::")
        )
        group = Path(tempfile.mkdtemp(dir=CGROUPS / own, prefix="prehab-export-"))
    except (OSError, StopIteration):
        return None
    try:
        if not (group / "memory.max").is_file():  # no cgroup file system, or one without the memory controller
            raise FileNotFoundError(group)
        (group / "memory.max").write_text(str(size), encoding="utf-8")
        (group / "memory.swap.max").write_text("0", encoding="utf-8")
    except OSError:
        group.rmdir()
        return None
    return group
