"""Where a fit measures: the target's answers, one row a model and number of threads.

A row is ``model``, ``threads``, ``p50_ms``, ``p95_ms`` of a request, and ``peak_mb``, the peak memory of the process
that serves it. Every model has a process of its own, and models are measured in turns, as in the bench.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import InputError
from prehab_export.bench_config import BenchConfig
from prehab_export.benchmark import bench, time_in_turns
from prehab_export.machine import available_cores, machine_facts
from prehab_export.probe import LayerProbe
from prehab_export.progress import bar

Row = dict[str, Any]

LOCAL = "local"
# Layers are many and quick, and only their medians count.
LAYER_ROUNDS, LAYER_SECONDS = 7, 0.02


def check_target(target: str, threads: Sequence[int]) -> None:
    """Raises:
    InputError: no such target, or it has fewer cores than threads are asked for.
    """
    if target != LOCAL:
        raise InputError(f"--target {target!r} is not known; {LOCAL} is this machine")
    if (most := available_cores()) < max(threads):
        raise InputError(f"--threads {max(threads)} is more than the {most} cores that this process may use")


def measure_layers(probes: Sequence[LayerProbe], tokens: int, threads: Sequence[int]) -> list[Row]:
    """The medians of all layer graphs; shape by shape, for those of one shape are compared with each other."""
    shapes = [list(group) for _, group in groupby(probes, key=lambda probe: probe.shape)]
    rows = []
    with bar("time layers", len(shapes) * len(threads)) as advance:
        for count in threads:
            config = BenchConfig(threads=count, warmup=2, rounds=LAYER_ROUNDS, min_seconds=LAYER_SECONDS)
            for group in shapes:
                samples = time_in_turns({probe.slug: probe.graph for probe in group}, config, tokens)
                for slug, taken in samples.items():
                    total = np.concatenate(taken.total)
                    rows.append({"model": slug, "threads": count, "p50_ms": float(np.median(total))})
                advance(1)
    return rows


def measure_models(
    models: Mapping[str, Path], config: BenchConfig, threads: Sequence[int], vocabulary: int | None
) -> list[Row]:
    """Whole models in one case, each with every number of threads.

    Args:
        config: the first batch size and the first length of it are the case.
    """
    config = replace(config, batch_sizes=config.batch_sizes[:1], sequence_lengths=config.sequence_lengths[:1])
    rows = []
    for count in threads:
        result = bench(models, replace(config, threads=count), vocabulary)
        rows += [
            {
                "model": row["model"],
                "threads": count,
                **{key: row[key] for key in ("p50_ms", "p95_ms", "runs", "round_p50_ms")},
                "peak_mb": row["peak_resident_mb"],
            }
            for row in result["cases"]
        ]
    return rows


def device_facts(_target: str) -> Row:
    """What is known of the device."""
    return machine_facts()
