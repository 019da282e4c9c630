"""What a budget of latency adds to a run: the times of its layers' shapes, and what ranks cost by them."""

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
    """Measure what the run's layers take, dense and at any rank, in requests as the bench makes them."""
    shapes = layer_shapes(session)
    setting = Setting(session.threads, tokens_at_a_time(session))
    times = measure_rank_times(shapes, setting, cache=rank_times_folder(), progress=bar)
    write_json(folder / TIMES, times.to_json())


def predicted_latency(session: Session, truncation: Truncation) -> float | None:
    """The share of their dense time that the layers will take, by the measured times; None without any."""
    if session.config.cut.latency is None:
        return None
    cost = session.cost
    before = sum(cost(layer.out_features, layer.in_features, None) for layer in truncation.layers)
    return sum(cost(m, n, rank) for m, n, rank in truncation.units()) / before


def layer_shapes(session: Session) -> list[Shape]:
    """(m, n) of every layer, and of every stack of layers with one input that may come to share a ``down``."""
    layers = session.layers(session.empty_model)
    groups: dict[tuple[str, bool], list[DenseLinear]] = {}
    for name, group in session.workspace.read_json("calibrate", "calibrate.json")["groups"].items():
        groups.setdefault((group, layers[name].bias is None), []).append(layers[name])
    # Under ``auto`` a part of a group may have another metric, and share among itself.
    by_kind = session.config.cut.objective == AUTO
    stacks = [
        stack
        for members in groups.values()
        for size in range(2, len(members) + 1)
        if by_kind or size == len(members)
        for stack in combinations(members, size)
    ]
    singles = [(layer,) for layer in layers.values()]
    return [
        (sum(dense_weight(layer).shape[0] for layer in stack), dense_weight(stack[0]).shape[1])
        for stack in (*singles, *stacks)
    ]


def tokens_at_a_time(session: Session) -> int:
    """Rows that a layer sees in a request as the bench makes it; of a decoder those of one new token."""
    bench = bench_config(session)
    if session.config.task == "text-generation":
        return bench.batch_sizes[0]
    if session.config.task == "text-classification":
        return bench.batch_sizes[0] * bench.sequence_lengths[0]
    facts = session.workspace.read_json("calibrate", "calibrate.json")
    return bench.batch_sizes[0] * max(facts["tokens"].values()) // facts["samples"]
