"""Child processes with limited cores and memory.

If this user may create a cgroup (v2), its ``memory.max`` is the limit, as in containers. It covers all memory, file
cache included, and the kernel kills a process that exceeds it. Otherwise the limit is ``RLIMIT_DATA``. It only covers
private writable memory, and an allocation that exceeds it fails (getrlimit(2), since Linux 4.7). The two limits are not
equivalent, so results name the one that was used.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from converters.errors import InputError
from prehab_export.measurement.targets.process_output import Watch, collect_output
from prehab_export.system import die_with_parent, environment, usable_cores

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limits:
    """Limits of a child process.

    cores: cores to run on; all when None. memory_mb: memory limit in 10⁶ bytes; no limit when None.

    Raises:
        InputError: this process may not use one of the cores, the memory limit is not above 0, or this system cannot
            enforce the limits.
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
                raise InputError("this system cannot restrict a process to some cores; measure without --pin-cores")
            usable = usable_cores()
            if unusable := [core for core in self.cores if core not in usable]:
                raise InputError(f"core {unusable[0]} is not among those of this process: {usable}")


def can_pin() -> bool:
    """Return whether this system can restrict a process to some cores."""
    return hasattr(os, "sched_setaffinity")


@dataclass(frozen=True)
class ProcessResult:
    """The result of a limited process.

    code: exit code; negative for a signal.
    output: stdout.
    errors: stderr.
    kind: type of the memory limit (``cgroup`` or ``RLIMIT_DATA``); None without a limit.
    """

    code: int
    output: str
    errors: str
    kind: str | None


def run_limited(command: Sequence[str], limits: Limits, watch: Watch | None = None) -> ProcessResult:
    """Run a command with limits until it ends.

    Args:
        watch: called with each line of stderr when it arrives. An exception from it kills the command and is raised
            again.
    """
    bind = die_with_parent()
    with _memory_limit(limits.memory_mb) as (kind, apply_limit):

        def prepare() -> None:  # runs in the child, before the command
            if bind is not None:
                bind()
            if limits.cores is not None:
                os.sched_setaffinity(0, limits.cores)
            apply_limit()

        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                env=environment(),
                preexec_fn=prepare if limits != Limits() else bind,  # Windows supports no preexec_fn
            )
        except subprocess.SubprocessError:  # the limit is too low to start the process
            return ProcessResult(-9, "", "the process could not start", kind)
        output, errors = collect_output(process, watch)
    return ProcessResult(process.returncode, output, errors, kind)


@contextmanager
def _memory_limit(megabytes: float | None) -> Iterator[tuple]:
    """Yield the type of the limit, and the function that a child calls to apply it to itself."""
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
    """Create a cgroup with a memory limit of ``size`` bytes and no swap, or return None if this user may not."""
    try:
        current_group = next(
            line.partition("::")[2].strip("/")
            for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
            if line.startswith("0::")
        )
        group = Path(tempfile.mkdtemp(dir=CGROUPS / current_group, prefix="prehab-export-"))
    except (OSError, StopIteration):
        return None
    try:
        if not (group / "memory.max").is_file():  # no cgroup file system, or no memory controller
            raise FileNotFoundError(group)
        (group / "memory.max").write_text(str(size), encoding="utf-8")
        (group / "memory.swap.max").write_text("0", encoding="utf-8")
    except OSError:
        group.rmdir()
        return None
    return group
