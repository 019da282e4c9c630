"""Resident memory of this process by kind, and its peaks over a period."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAMPLE_INTERVAL_S = 0.002
STATUS = Path("/proc/self/status")


def resident_kb() -> dict[str, int]:
    """Return this process's memory by kind (anonymous, file, peak), in KiB; empty on systems without /proc."""
    try:
        lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
        kb = {key: int(lines[key].split()[0]) for key in ("VmHWM", "RssAnon", "RssFile", "RssShmem")}
    except (OSError, KeyError):
        return {}
    return {"anonymous": kb["RssAnon"] + kb["RssShmem"], "file": kb["RssFile"], "peak": kb["VmHWM"]}


@contextmanager
def sampled_memory() -> Iterator[dict[str, int]]:
    """Sample the peak of each kind of memory while the block runs; the kernel only records the peak of their sum."""
    peaks: dict[str, int] = {}
    done = threading.Event()

    def sample() -> None:
        finished = False
        while not finished:
            finished = done.wait(SAMPLE_INTERVAL_S)  # one more sample follows after the end
            for kind, kb in resident_kb().items():
                peaks[kind] = max(peaks.get(kind, 0), kb)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peaks
    finally:
        done.set()
        sampler.join()


def memory_figures(runtime: dict[str, int], peaks: dict[str, int]) -> dict[str, float | None]:
    """Return the memory figures of a model in MB (10⁶ bytes).

    Args:
        runtime: memory of Python and ONNX Runtime before a model is loaded, as `resident_kb` returns it.
        peaks: peaks with the model, which include the runtime, as `sampled_memory` yields them.
    """
    resident = peaks.get("peak", _rusage_peak_kb())
    kb = {
        "peak_resident_mb": resident,
        "peak_anonymous_mb": peaks.get("anonymous"),
        "mapped_file_mb": peaks.get("file"),
        "runtime_resident_mb": runtime["anonymous"] + runtime["file"] if runtime else None,
        "runtime_anonymous_mb": runtime.get("anonymous"),
        "runtime_file_mb": runtime.get("file"),
    }
    return {key: None if value is None else value * 1024 / 1e6 for key, value in kb.items()}


def _rusage_peak_kb() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "darwin" else peak
