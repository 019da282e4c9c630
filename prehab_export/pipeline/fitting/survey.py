"""The survey of a target: the graphs that it measures, and the cost models that follow from its figures.

The survey times every layer shape, dense and at a few ranks, in each kind of quantisation. Each of these graphs holds
several copies of one layer, so that the weights come from the same level of memory as a model's weights. The survey
also measures the time, memory and size of a few complete models, the *anchors*. The ``search`` module interpolates
between these figures.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir

from converters.onnx.quantize import quantize_graph
from prehab_export.linalg import break_even
from prehab_export.measurement import Curve, RankTimes, Setting, Shape, layer_graph
from prehab_export.pipeline.fitting.search import FLOAT32, CostModel, Line, Setup
from prehab_export.system import Progress, silent, step

Row = Mapping[str, Any]

# The ranks to time, as shares of a shape's break-even rank. The time is nearly linear in the rank between them.
RANK_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
# Most bytes that the copies of one layer take together. They exceed most caches, and a device receives them quickly.
MAX_COPIES_BYTES = 16_000_000
# Kernels are fastest at multiples of this rank.
RANK_MULTIPLE = 8


@dataclass(frozen=True)
class LayerGraph:
    """A graph of ``copies`` m×n layers, either dense (rank None) or as two factors."""

    slug: str
    mode: str
    shape: Shape
    rank: int | None
    copies: int
    path: Path


@dataclass(frozen=True)
class Anchor:
    """A complete model in one mode.

    units: (m, n, rank) of each selected layer; the rank is None for a dense layer.
    """

    slug: str
    mode: str
    units: Sequence[tuple[int, int, int | None]]
    size_mb: float
    graph: Path

    @property
    def parameters(self) -> int:
        """The number of parameters of the selected layers."""
        return sum(m * n if rank is None else rank * (m + n) for m, n, rank in self.units)


def survey_ranks(m: int, n: int) -> tuple[int, ...]:
    """Return the ranks to time for an m×n layer: multiples of 8, except in layers too small for them.

    >>> survey_ranks(384, 384)
    (16, 48, 96, 144, 192)
    >>> survey_ranks(32, 32)
    (1, 4, 8, 16)
    """
    limit = break_even(m, n)
    ranks = {RANK_MULTIPLE * int(share * limit / RANK_MULTIPLE) or max(1, int(share * limit)) for share in RANK_SHARES}
    return (*sorted(rank for rank in ranks if rank < limit), limit)


def case_name(shape: Shape) -> str:
    """Return the name of the benchmark case for a shape."""
    return f"layer-{shape[0]}x{shape[1]}"


def write_layer_graphs(
    shapes: Iterable[Shape],
    tokens: int,
    modes: Sequence[str],
    folder: Path,
    progress: Progress = silent,
) -> list[LayerGraph]:
    """Write the graphs of every shape in every mode, and return them grouped by shape.

    Args:
        shapes: (m, n) of each layer. A shape occurs once for each layer that has it.
        tokens: the number of rows in a layer's input.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = Counter(shapes)
    graphs: list[LayerGraph] = []
    with progress("write layer graphs", len(counts)) as advance:
        for (m, n), count in counts.items():
            with step(advance, f"{m}×{n}"):
                copies = max(1, min(count, MAX_COPIES_BYTES // (4 * m * n)))
                for rank in (None, *survey_ranks(m, n)):
                    graphs += _write_modes((m, n), rank, copies, tokens, modes, folder)
    return graphs


def _write_modes(
    shape: Shape, rank: int | None, copies: int, tokens: int, modes: Sequence[str], folder: Path
) -> Iterator[LayerGraph]:
    """Write the graphs of one shape at one rank, one graph for each mode. A rank of None means dense."""
    name = f"{case_name(shape)}-{'dense' if rank is None else f'r{rank}'}"
    source = folder / f"{name}-{FLOAT32}.onnx"
    ir.save(layer_graph(*shape, rank, copies, tokens), source)
    for mode in modes:
        path = folder / f"{name}-{mode}.onnx"
        if mode != FLOAT32:
            quantize_graph(source, path, mode, partial(_activation_sample, shape, tokens), may_grow=True)
        yield LayerGraph(f"{name}-{mode}", mode, shape, rank, copies, path)


def layer_input(shape: Shape, tokens: int) -> dict[str, np.ndarray]:
    """Return a random input of shape (tokens, n) for the graphs of an m×n layer, by input name."""
    return {"x": np.random.default_rng(0).standard_normal((tokens, shape[1]), dtype=np.float32)}


def _activation_sample(shape: Shape, tokens: int) -> Iterator[dict[str, np.ndarray]]:
    yield layer_input(shape, tokens)


def fit_cost_models(
    rows: Sequence[Row],
    graphs: Sequence[LayerGraph],
    anchors: Sequence[Anchor],
    penalties: Mapping[str, float],
    tokens: int,
) -> dict[Setup, CostModel]:
    """Return the cost model of every mode and number of threads.

    Args:
        rows: the target's measurements, with the keys model, threads, p50_ms, p95_ms and peak_mb.
        penalties: the loss that each mode adds to the dense model, in nats.
        tokens: the number of rows in a layer's input.
    """
    thread_counts = sorted({row["threads"] for row in rows})
    rows_by_key = {(row["model"], row["threads"]): row for row in rows}
    modes = dict.fromkeys(anchor.mode for anchor in anchors)
    cost_models = {}
    for mode in modes:
        mode_graphs = [graph for graph in graphs if graph.mode == mode]
        mode_anchors = [anchor for anchor in anchors if anchor.mode == mode]
        for threads in thread_counts:
            p50_ms = {graph.slug: rows_by_key[graph.slug, threads]["p50_ms"] for graph in mode_graphs}
            times = _fit_rank_times(mode_graphs, p50_ms, Setting(threads, tokens))
            anchor_rows = {anchor.slug: rows_by_key[anchor.slug, threads] for anchor in mode_anchors}
            setup = Setup(mode, threads)
            cost_models[setup] = _fit_cost_model(setup, times, mode_anchors, anchor_rows, penalties)
    return cost_models


def _fit_rank_times(graphs: Sequence[LayerGraph], p50_ms: Mapping[str, float], setting: Setting) -> RankTimes:
    curves = {}
    for shape in dict.fromkeys(graph.shape for graph in graphs):
        seconds = {graph.rank: p50_ms[graph.slug] / 1e3 / graph.copies for graph in graphs if graph.shape == shape}
        ranks = sorted(rank for rank in seconds if rank is not None)
        curves[shape] = Curve(seconds[None], tuple(ranks), tuple(seconds[rank] for rank in ranks))
    return RankTimes(setting, curves)


def _fit_cost_model(
    setup: Setup,
    times: RankTimes,
    anchors: Sequence[Anchor],
    rows: Mapping[str, Row],
    penalties: Mapping[str, float],
) -> CostModel:
    """Return the cost model of a setup.

    Args:
        rows: the measurements of the anchors, by slug.
    """

    def line_by_parameters(values: Mapping[str, float]) -> Line:
        return Line.through((anchor.parameters, values[anchor.slug]) for anchor in anchors)

    layer_seconds = {anchor.slug: sum(times.cost(*unit) for unit in anchor.units) for anchor in anchors}
    memory = {slug: row.get("peak_mb") for slug, row in rows.items()}
    return CostModel(
        setup,
        cache(times.cost),  # the search asks for the same ranks many times
        latency=Line.through((layer_seconds[anchor.slug], rows[anchor.slug]["p50_ms"]) for anchor in anchors),
        tail_ratio=median(row["p95_ms"] / row["p50_ms"] for row in rows.values()),
        size=line_by_parameters({anchor.slug: anchor.size_mb for anchor in anchors}),
        memory=(
            None
            if None in memory.values()
            else line_by_parameters({slug: float(peak_mb or 0) for slug, peak_mb in memory.items()})
        ),
        penalty=penalties.get(setup.mode, 0.0),
    )
