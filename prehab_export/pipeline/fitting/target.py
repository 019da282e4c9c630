"""The measurements of a fit at its target.

Each visit takes a kit of models to the target and brings back rows of figures. A row holds ``model``, ``threads``, the
``p50_ms`` and ``p95_ms`` of a request, and ``peak_mb``, the peak memory of a process that serves only this model.
``peak_mb`` is None if the target does not report memory.
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
from prehab_export.pipeline.fitting.survey import LayerGraph, case_name
from prehab_export.system import Progress, available_cores, machine_facts, silent, step

Row = dict[str, Any]

# A survey has many layers, each of them is fast, and only their medians matter: a short benchmark is enough.
LAYER_BENCH = BenchConfig(threads=1, warmup=2, rounds=9, min_seconds=0.02)
ROW_KEYS = ("model", "threads", "p50_ms", "p95_ms", "peak_mb", "runs", "rounds")


def check_target(target: Target, threads: Sequence[int]) -> None:
    """Check that a fit can measure at the target.

    Raises:
        InputError: someone would have to run the measurements by hand, this system cannot enforce the target's
            limits, or this machine has fewer cores than ``threads`` asks for.
        TargetError: the target cannot be reached.
    """
    if target.name.startswith("kit:") or target.by_hand:
        raise InputError(
            "a fit measures at its target twice, which cannot be done by hand; give local, ssh://, adb or browser"
        )
    limits_of(target)
    if target.name == "browser":
        find_web(target.web)
        find_browser(target.browser)
    elif target.name != "local":
        with shell_of(target) as shell:
            shell.run("true")
    elif (cores := available_cores()) < max(threads):
        raise InputError(f"--threads {max(threads)} is more than the {cores} cores that this process may use")


def identify_target(target: Target) -> Row:
    """Return the facts that tell this target from others: its name and, if it is this machine, the facts of the
    machine."""
    return {"target": target.name, "machine": machine_facts() if target.name in ("local", "browser") else None}


def visit_facts(target: Target, bench: BenchConfig) -> Row:
    """Return the facts on which measurements at the target depend, other than the models."""
    return {**identify_target(target), "bench": asdict(bench)}


def measure_layers(
    graphs: Sequence[LayerGraph],
    tokens: int,
    threads: Sequence[int],
    target: Target,
    folder: Path,
    progress: Progress = silent,
) -> list[Row]:
    """Return the times of all layer graphs.

    Graphs of one shape form one kit: they take the same input, and the benchmark alternates between them.

    Args:
        graphs: the layer graphs, with the graphs of one shape next to each other.
        tokens: the number of rows in a layer's input.
        threads: the numbers of threads to measure with.
        folder: a temporary folder for the kits. It is removed.
    """
    config = replace(LAYER_BENCH, thread_counts=tuple(threads), batch_sizes=(tokens,))
    shapes = [list(group) for _, group in groupby(graphs, key=lambda graph: graph.shape)]
    rows = []
    with progress("time layers", len(shapes)) as advance:
        for group in shapes:
            case = case_name(group[0].shape)
            with step(advance, case):
                models = {graph.slug: graph.path for graph in group}
                rows += _measure(models, config, target, folder / case, memory=False)["rows"]
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
    """Return the ``rows`` of complete models, one for each model and number of threads, and the ``device``.

    Args:
        models: the graph of each model, by name.
        config: the benchmark. Only its first batch size and its first sequence length are measured.
        threads: the numbers of threads to measure with.
        folder: a temporary folder for the kit. It is removed.
    """
    config = replace(
        config,
        thread_counts=tuple(threads),
        batch_sizes=config.batch_sizes[:1],
        sequence_lengths=config.sequence_lengths[:1],
    )
    results = _measure(models, config, target, folder / "models", progress=progress)
    shutil.rmtree(folder)
    return results


def _measure(
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
    return {"device": results["device"], "rows": [{key: row.get(key) for key in ROW_KEYS} for row in results["cases"]]}
