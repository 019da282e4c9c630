"""Describe the machine behind a measurement: processor, usable cores, memory, operating system, library versions.

Nothing here names a person, a host or a path, so the description can be published with a result.
"""

import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

LIBRARIES = ("prehab-export", "torch", "transformers", "onnx", "onnxruntime", "peft", "safetensors")
# The processor flags that decide the speed of low-precision matrix products.
VECTOR_EXTENSIONS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 1 << 60  # the first cgroup version writes a huge number for "no limit"


def machine_facts() -> dict[str, Any]:
    """Describe the machine in JSON types. What this system does not reveal is None; memory is in MB (10⁶ bytes)."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    limit = min(_cgroup_memory_limits(), default=None)
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine() or None,
        "vector_extensions": [name for name in VECTOR_EXTENSIONS if name in flags],
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(logical=True),
        "available_cores": available_cores(),
        "governor": _text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "memory_mb": round(psutil.virtual_memory().total / 1e6),
        "memory_limit_mb": None if limit is None else round(limit / 1e6),
        "os": _operating_system(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def available_cores() -> int:
    """Count the cores that this process may really use: its affinity, limited by the container's CPU quota; at least
    1."""
    return max(1, min([len(usable_cores()), *(int(quota) for quota in _cgroup_cpu_quotas())]))


def usable_cores() -> list[int]:
    """Return the numbers of the cores that this process may run on; all cores if the system has no affinity."""
    has_affinity = hasattr(os, "sched_getaffinity")  # neither macOS nor Windows has it
    return sorted(os.sched_getaffinity(0)) if has_affinity else list(range(os.cpu_count() or 1))


def _cpu_model() -> str | None:
    """The name of the processor, or else of the board: ARM Linux has no "model name" of the processor."""
    if platform.system() == "Darwin":
        sysctl = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            encoding="utf-8",
            env={},
            check=False,
        )
        return sysctl.stdout.strip() or None
    board = _text(Path("/proc/device-tree/model"))
    return _cpuinfo("model name") or board or _cpuinfo("Hardware") or platform.processor() or None


def _cpuinfo(field: str) -> str | None:
    """The first value of a field in /proc/cpuinfo."""
    for line in (_text(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == field and value.strip():
            return value.strip()
    return None


def _operating_system() -> str:
    kernel = f"{platform.system()} {platform.release()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']} ({kernel})"
    except (OSError, KeyError):
        return kernel


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cgroup_cpu_quotas() -> Iterator[float]:
    """The number of cores granted by each limit on this process (cgroup version 2, then version 1)."""
    for folder in _cgroup_folders(""):
        quota, _, period = (_text(folder / "cpu.max") or "").partition(" ")
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)
    for folder in _cgroup_folders("cpu"):
        quota, period = _text(folder / "cpu.cfs_quota_us") or "", _text(folder / "cpu.cfs_period_us") or ""
        if quota.isdigit() and period.isdigit():  # "-1" means no limit
            yield int(quota) / int(period)


def _cgroup_memory_limits() -> Iterator[int]:
    """Each memory limit on this process, in bytes."""
    for controller, file in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
        for folder in _cgroup_folders(controller):
            limit = _text(folder / file) or ""
            if limit.isdigit() and int(limit) < _UNLIMITED_BYTES:
                yield int(limit)


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """The folders of this process's control group and its parents; "" names version 2's single hierarchy.

    Inside a container, the path in /proc/self/cgroup may be the host's and not exist; only the root then counts.
    """
    for line in (_text(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        root = _CGROUPS / controllers
        inner = root / path.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root))


def _text(path: Path) -> str | None:
    """The stripped text of a file; None if it is empty, missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8").strip("\0 \n") or None
    except (OSError, UnicodeDecodeError):
        return None
