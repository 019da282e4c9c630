"""Measurement of a kit on this machine: without limits, with limits, and for a table of threads × memory."""

import json
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from prehab_export.measurement.targets.kit import RUNNER, Kit
from prehab_export.measurement.targets.limits import Limits, ProcessResult, can_pin, run_limited
from prehab_export.measurement.targets.results import Json, read_results
from prehab_export.measurement.targets.rounds import count_rounds, follow
from prehab_export.system import ParityError, Progress, TargetError, python_script, silent, step, usable_cores

# The exit code of the runner for answers that are out of tolerance.
_OUT_OF_TOLERANCE = 3

# The bisection of the least memory stops when the interval is narrower than this share of its upper end.
RELATIVE_PRECISION = 0.02


def measure_locally(
    kit: Kit, limits: Limits, arguments: Sequence[str] = (), place: str = "local", progress: Progress = silent
) -> Json:
    """Run a kit in a child process with limits and return its results, which record the limits.

    Args:
        arguments: further arguments of the runner.
        place: name of this target in the results.

    Raises:
        ParityError: the answers of a model differ from the recorded ones.
        TargetError: the runner ran out of memory or failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "results.json")
        command = [*_command(kit), "--place", place, "--out", str(out), *arguments]
        with progress("measure here", count_rounds(kit)) as advance:
            process = run_limited(command, limits, follow(advance))
        if process.code != 0:
            if limits.memory_mb is not None and process.code != _OUT_OF_TOLERANCE:
                # A process that runs out of memory can fail in many ways. If the kit runs without limits, memory was
                # the reason.
                _check_without_limits(kit)
                raise TargetError(
                    f"not all models run in {limits.memory_mb:g} MB ({process.kind}); --matrix finds how much they need"
                )
            raise _failure(process)
        results = read_results(out, kit.digest)
    cores = None if limits.cores is None else list(limits.cores)
    return results | {"limits": {"cores": cores, "memory_mb": limits.memory_mb, "memory_limit": process.kind}}


def matrix(kit: Kit, threads: Sequence[int], memory_mb: Sequence[float], progress: Progress = silent) -> Json:
    """Measure every model with each combination of threads and memory, and determine the least memory in which it runs.

    Args:
        memory_mb: memory limits in 10⁶ bytes.

    Returns:
        A dictionary of ``cells`` (rows with model, threads, memory_mb, runs, and p50_ms and p95_ms of the slowest
        case), ``least`` (rows with model, threads and memory_mb, by bisection to 2%), and ``memory_limit`` (the type of
        the limit).

    Raises:
        ParityError: the answers of a model differ from the recorded ones.
        TargetError: the kit does not run without limits.
    """
    _check_without_limits(kit)  # a run that fails below therefore lacks memory
    cells, least, kind = [], [], None
    models = kit.facts["models"]
    with progress("threads × memory", len(threads) * len(models) * (len(memory_mb) + 1)) as advance:
        for count, model in product(threads, models):
            cores = tuple(usable_cores()[:count]) if can_pin() else None
            key = {"model": model["name"], "threads": count}
            for size in memory_mb:
                with step(advance, f"{model['name']}, {count} thread(s), {size:g} MB"):
                    cell, kind = _measure_cell(kit, model["slug"], count, Limits(cores, size))
                cells.append({**key, "memory_mb": size, **cell})
            with step(advance, f"{model['name']}, {count} thread(s): the least memory"):
                least.append({**key, "memory_mb": _least_memory_mb(kit, model["slug"], count, cores)})
    return {"cells": cells, "least": least, "memory_limit": kind}


def _measure_cell(kit: Kit, slug: str, threads: int, limits: Limits) -> tuple[Json, str | None]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "results.json")
        arguments = ["--model", slug, "--threads", str(threads), "--out", str(out), "--no-memory"]
        process = run_limited([*_command(kit), *arguments], limits)
        if process.code != 0:
            return {"runs": False, "p50_ms": None, "p95_ms": None}, process.kind
        rows = json.loads(out.read_text(encoding="utf-8"))["cases"]
    slowest = max(rows, key=lambda row: row["p50_ms"])
    return {"runs": True, "p50_ms": slowest["p50_ms"], "p95_ms": slowest["p95_ms"]}, process.kind


def _least_memory_mb(kit: Kit, slug: str, threads: int, cores: tuple[int, ...] | None) -> float:
    """Return the least memory in which a model serves every case, in MB."""
    command = [*_command(kit), "--memory", slug, "--threads", str(threads)]

    def runs(megabytes: float) -> bool:
        return run_limited(command, Limits(cores, megabytes)).code == 0

    high = 64.0
    while not runs(high):
        high *= 2
        if high > 1e7:
            raise TargetError(f"{slug} does not run in any amount of memory that was tried")
    low = 0.0 if high == 64.0 else high / 2
    while high - low > RELATIVE_PRECISION * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if runs(middle) else (middle, high)
    return high


def _command(kit: Kit) -> list[str]:
    return python_script(kit.folder / RUNNER)


def _check_without_limits(kit: Kit) -> None:
    """Check that the kit runs without limits.

    Raises:
        ParityError: the answers of a model differ from the recorded ones.
        TargetError: the runner failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--check-only", "--out", str(Path(folder, "results.json"))]
        process = run_limited([*_command(kit), *arguments], Limits())
    if process.code != 0:
        raise _failure(process)


def _failure(process: ProcessResult) -> Exception:
    """Return the error for a runner that failed, with its last line of stderr as the message."""
    lines = [line.strip() for line in process.errors.splitlines() if line.strip()]
    reason = lines[-1].removeprefix("error: ") if lines else f"the runner ended with exit code {process.code}"
    return ParityError(reason) if process.code == _OUT_OF_TOLERANCE else TargetError(reason)
