"""Latency budgets: measured times of the layers' shapes, and the latency that ranks lead to."""

from itertools import combinations
from pathlib import Path

from converters.lowrank import DenseLinear, dense_weight
from prehab_export.compression import Truncation
from prehab_export.config import AUTO
from prehab_export.measurement import Setting, Shape, measure_rank_times, rank_times_folder
from prehab_export.pipeline.checks import bench_config
from prehab_export.pipeline.session import TIMES, Session
from prehab_export.system import bar, write_json


def time_ranks(session: Session, folder: Path) -> None:
    """Measure the run's layers, dense and over all ranks, at the batch size of the bench; write ``times.json``."""
    shapes = layer_shapes(session)
    setting = Setting(session.threads, tokens_per_request(session))
    times = measure_rank_times(shapes, setting, cache=rank_times_folder(), progress=bar)
    write_json(folder / TIMES, times.to_json())


def predicted_latency(session: Session, truncation: Truncation) -> float | None:
    """Return the layers' predicted time as a share of their dense time; None for a run without a latency budget."""
    if session.config.cut.latency is None:
        return None
    cost = session.cost
    dense_time = sum(cost(layer.out_features, layer.in_features, None) for layer in truncation.layers)
    return sum(cost(m, n, rank) for m, n, rank in truncation.units()) / dense_time


def layer_shapes(session: Session) -> list[Shape]:
    """Return (m, n) of every layer, and of every stack of layers with a common input that may share a ``down``."""
    layers = session.layers(session.empty_model)
    groups: dict[tuple[str, bool], list[DenseLinear]] = {}
    for name, group in session.workspace.read_json("calibrate", "calibrate.json")["groups"].items():
        groups.setdefault((group, layers[name].bias is None), []).append(layers[name])
    # Under ``auto``, layers of a group may differ in metric, so that only a subset of them shares a ``down``.
    allows_subsets = session.config.cut.objective == AUTO
    stacks = [
        stack
        for members in groups.values()
        for size in range(2, len(members) + 1)
        if allows_subsets or size == len(members)
        for stack in combinations(members, size)
    ]
    singles = [(layer,) for layer in layers.values()]
    return [
        (sum(dense_weight(layer).shape[0] for layer in stack), dense_weight(stack[0]).shape[1])
        for stack in (*singles, *stacks)
    ]


def tokens_per_request(session: Session) -> int:
    """Return the rows that a layer processes in a request of the bench; for a decoder, in generating a token."""
    bench = bench_config(session)
    if session.config.task == "text-generation":
        return bench.batch_sizes[0]
    if session.config.task == "text-classification":
        return bench.batch_sizes[0] * bench.sequence_lengths[0]
    facts = session.workspace.read_json("calibrate", "calibrate.json")
    return bench.batch_sizes[0] * max(facts["tokens"].values()) // facts["samples"]
