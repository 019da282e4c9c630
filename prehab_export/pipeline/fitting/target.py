"""Where a fit measures: kits, taken to the target and brought back as rows of figures.

A row is ``model``, ``threads``, ``p50_ms`` and ``p95_ms`` of a request, and ``peak_mb``, the peak memory of a process
that serves the model alone; None where the target does not tell.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from converters.errors import InputError
from prehab_export.config import BenchConfig, Target
from prehab_export.measurement import (
    find_browser,
    find_web,
    limits_of,
    make_kit,
    measure_in_browser,
    measure_locally,
    measure_remotely,
    shell_of,
)
from prehab_export.pipeline.fitting.survey import LayerGraph, case_of
from prehab_export.system import Progress, available_cores, machine_facts, silent, step

Row = dict[str, Any]

# Layers are many and quick, and only their medians count.
LAYERS = BenchConfig(threads=1, warmup=2, rounds=9, min_seconds=0.02)
FIGURES = ("model", "threads", "p50_ms", "p95_ms", "peak_mb", "runs", "rounds")


def check_target(target: Target, threads: Sequence[int]) -> None:
    """Raises:
    InputError: a place that cannot answer at once, limits that this system lacks, or fewer cores than threads.
    TargetError: it cannot be reached.
    """
    if target.name.startswith("kit:") or target.by_hand:
        raise InputError(
            "a fit asks its target twice, which cannot be done by hand; give local, ssh://, adb or browser"
        )
    limits_of(target)
    if target.name == "browser":
        find_web(target.web)
        find_browser(target.browser)
    elif target.name != "local":
        with shell_of(target) as shell:
            shell.run("true")
    elif (most := available_cores()) < max(threads):
        raise InputError(f"--threads {max(threads)} is more than the {most} cores that this process may use")


def place_of(target: Target) -> Row:
    """What measurements at a target hold for: its name, and of this machine, where it is that, all that is known."""
    return {"target": target.name, "machine": machine_facts() if target.name in ("local", "browser") else None}


def visit_facts(target: Target, bench: BenchConfig) -> Row:
    """What a visit to a target depends on besides the models."""
    return {**place_of(target), "bench": asdict(bench)}


def measure_layers(
    graphs: Sequence[LayerGraph],
    tokens: int,
    threads: Sequence[int],
    target: Target,
    folder: Path,
    progress: Progress = silent,
) -> list[Row]:
    """The times of all layer graphs, a kit a shape: those of one shape take the same input and turns with each other.

    Args:
        folder: a place for the kits, gone afterwards.
    """
    config = replace(LAYERS, thread_counts=tuple(threads), batch_sizes=(tokens,))
    shapes = [list(group) for _, group in groupby(graphs, key=lambda graph: graph.shape)]
    rows = []
    with progress("time layers", len(shapes)) as advance:
        for group in shapes:
            case = case_of(group[0].shape)
            with step(advance, case):
                models = {graph.slug: graph.path for graph in group}
                rows += _measured(models, config, target, folder / case, memory=False)["rows"]
    shutil.rmtree(folder)
    return rows


def measure_models(
    models: Mapping[str, Path],
    config: BenchConfig,
    threads: Sequence[int],
    target: Target,
    folder: Path,
    progress: Progress = silent,
) -> Row:
    """``rows`` of whole models in one case, with every number of threads, and the ``device``.

    Args:
        config: the first batch size and the first length of it are the case.
        folder: a place for the kit, gone afterwards.
    """
    config = replace(
        config,
        thread_counts=tuple(threads),
        batch_sizes=config.batch_sizes[:1],
        sequence_lengths=config.sequence_lengths[:1],
    )
    results = _measured(models, config, target, folder / "models", progress=progress)
    shutil.rmtree(folder)
    return results


def _measured(
    models: Mapping[str, Path],
    config: BenchConfig,
    target: Target,
    folder: Path,
    *,
    memory: bool = True,
    progress: Progress = silent,
) -> Row:
    kit = make_kit(models, folder, config, target.cooldown_s)
    if target.name == "local":
        results = measure_locally(kit, limits_of(target), () if memory else ("--no-memory",), progress=progress)
    elif target.name == "browser":
        results = measure_in_browser(
            kit, config.thread_counts, browser=target.browser, web=target.web, progress=progress
        )
    else:
        with shell_of(target) as shell:
            place = target.name.partition(":")[0]
            results = measure_remotely(kit, shell, place, target.python, target.keep, progress)
    return {"device": results["device"], "rows": [{key: row.get(key) for key in FIGURES} for row in results["cases"]]}
