"""A kit on this machine: as it is, within limits, and the whole table of threads × memory."""

import json
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from prehab_export.measurement.targets.kit import RUNNER, Kit
from prehab_export.measurement.targets.limits import Ended, Limits, can_pin, run_limited
from prehab_export.measurement.targets.results import Json, read_results
from prehab_export.measurement.targets.rounds import follow, rounds_of
from prehab_export.system import ParityError, Progress, TargetError, python_script, silent, step, usable_cores

# An exit code of the runner.
_OUT_OF_TOLERANCE = 3

# Bisection ends when the smallest memory is known to a part in so many.
PRECISION = 50


def measure_locally(
    kit: Kit, limits: Limits, arguments: Sequence[str] = (), place: str = "local", progress: Progress = silent
) -> Json:
    """The results of the kit's runner in a process of its own; they say what limits held.

    Raises:
        ParityError: a model gives other answers than recorded.
        TargetError: it ran out of memory, or failed otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "results.json")
        command = [*_command(kit), "--place", place, "--out", str(out), *arguments]
        with progress("measure here", rounds_of(kit)) as advance:
            ended = run_limited(command, limits, follow(advance))
        if ended.code != 0:
            if limits.memory_mb is not None and ended.code != _OUT_OF_TOLERANCE:
                # A process without memory fails in many ways; if it works with more, that is what it lacked.
                _check(kit)
                raise TargetError(
                    f"not all models run in {limits.memory_mb:g} MB ({ended.kind}); --matrix finds what does"
                )
            raise _failure(ended)
        results = read_results(out, kit.digest)
    cores = None if limits.cores is None else list(limits.cores)
    return results | {"limits": {"cores": cores, "memory_mb": limits.memory_mb, "memory_limit": ended.kind}}


def matrix(kit: Kit, threads: Sequence[int], memory_mb: Sequence[float], progress: Progress = silent) -> Json:
    """Threads × memory for every model: whether it runs and how fast, and the least memory in which it does.

    Returns:
        ``cells``: model, threads, memory_mb, runs, p50_ms and p95_ms of the slowest case; ``least``: model, threads,
        memory_mb, found by bisection to 2%; ``memory_limit``: which limit held.
    """
    _check(kit)  # from here on, what does not run lacks memory
    cells, least, kind = [], [], None
    models = kit.facts["models"]
    with progress("threads × memory", len(threads) * len(models) * (len(memory_mb) + 1)) as advance:
        for count, model in product(threads, models):
            cores = tuple(usable_cores()[:count]) if can_pin() else None
            own = {"model": model["name"], "threads": count}
            for size in memory_mb:
                with step(advance, f"{model['name']}, {count} thread(s), {size:g} MB"):
                    cell, kind = _cell(kit, model["slug"], count, Limits(cores, size))
                cells.append({**own, "memory_mb": size, **cell})
            with step(advance, f"{model['name']}, {count} thread(s): the least memory"):
                least.append({**own, "memory_mb": _least(kit, model["slug"], count, cores)})
    return {"cells": cells, "least": least, "memory_limit": kind}


def _cell(kit: Kit, slug: str, threads: int, limits: Limits) -> tuple[Json, str | None]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "results.json")
        own = ["--model", slug, "--threads", str(threads), "--out", str(out), "--no-memory"]
        ended = run_limited([*_command(kit), *own], limits)
        if ended.code != 0:
            return {"runs": False, "p50_ms": None, "p95_ms": None}, ended.kind
        rows = json.loads(out.read_text(encoding="utf-8"))["cases"]
    slowest = max(rows, key=lambda row: row["p50_ms"])
    return {"runs": True, "p50_ms": slowest["p50_ms"], "p95_ms": slowest["p95_ms"]}, ended.kind


def _least(kit: Kit, slug: str, threads: int, cores: tuple[int, ...] | None) -> float:
    """The least memory in MB in which a model serves every case."""
    command = [*_command(kit), "--memory", slug, "--threads", str(threads)]

    def runs(megabytes: float) -> bool:
        return run_limited(command, Limits(cores, megabytes)).code == 0

    high = 64.0
    while not runs(high):
        high *= 2
        if high > 1e7:
            raise TargetError(f"{slug} does not run in any memory that was tried")
    low = 0.0 if high == 64.0 else high / 2
    while high - low > high / PRECISION:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if runs(middle) else (middle, high)
    return high


def _command(kit: Kit) -> list[str]:
    return python_script(kit.folder / RUNNER)


def _check(kit: Kit) -> None:
    """Raises:
    ParityError, TargetError: the kit does not run without limits either.
    """
    with tempfile.TemporaryDirectory() as folder:
        ended = run_limited([*_command(kit), "--check-only", "--out", str(Path(folder, "results.json"))], Limits())
    if ended.code != 0:
        raise _failure(ended)


def _failure(ended: Ended) -> Exception:
    lines = [line.strip() for line in ended.errors.splitlines() if line.strip()]
    said = lines[-1].removeprefix("error: ") if lines else f"the runner ended with exit code {ended.code}"
    return ParityError(said) if ended.code == _OUT_OF_TOLERANCE else TargetError(said)
