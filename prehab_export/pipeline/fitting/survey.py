"""What is asked of a target before a fit, and what its answer tells.

Of every layer shape, the time at a few ranks and dense, in each kind of quantisation: one tiny graph each, with several
copies of the layer, so that weights come from where a model's weights come from. Of a few whole models, the *anchors*,
time, memory and size: between them everything else is read off (``search``).
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
from prehab_export.pipeline.fitting.search import FLOAT32, Knowledge, Layers, Line, Setup
from prehab_export.system import Progress, silent, step

Row = Mapping[str, Any]

# Ranks of each shape, as shares of its break-even rank: a curve is nearly straight in between.
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
# What the copies of one layer may weigh together: beyond most caches, and still quickly carried to a device.
MOST_BYTES = 16_000_000
MULTIPLE = 8


@dataclass(frozen=True)
class LayerGraph:
    """A graph of ``copies`` m×n layers, dense (rank None) or as two factors."""

    slug: str
    mode: str
    shape: Shape
    rank: int | None
    copies: int
    path: Path


@dataclass(frozen=True)
class Anchor:
    """A whole model in one mode. units: (m, n, rank) of its selected layers, None for dense."""

    slug: str
    mode: str
    units: Sequence[tuple[int, int, int | None]]
    size_mb: float
    graph: Path

    @property
    def parameters(self) -> int:
        return sum(m * n if rank is None else rank * (m + n) for m, n, rank in self.units)


def surveyed_ranks(m: int, n: int) -> tuple[int, ...]:
    """The ranks to time: in multiples that kernels like, where the layer is not too small for them.

    >>> surveyed_ranks(384, 384)
    (16, 48, 96, 144, 192)
    >>> surveyed_ranks(32, 32)
    (1, 4, 8, 16)
    """
    most = break_even(m, n)
    rounded = {MULTIPLE * int(share * most / MULTIPLE) or max(1, int(share * most)) for share in SHARES}
    return (*sorted(rank for rank in rounded if rank < most), most)


def case_of(shape: Shape) -> str:
    """The name of a shape's case."""
    return f"layer-{shape[0]}x{shape[1]}"


def write_layer_graphs(
    shapes: Iterable[Shape],
    tokens: int,
    modes: Sequence[str],
    folder: Path,
    progress: Progress = silent,
) -> list[LayerGraph]:
    """Write the graphs of every shape in every mode.

    Args:
        shapes: (m, n) of each layer, as often as it occurs.
        tokens: rows that go through a layer at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = Counter(shapes)
    graphs: list[LayerGraph] = []
    with progress("write layer graphs", len(counts)) as advance:
        for (m, n), count in counts.items():
            with step(advance, f"{m}×{n}"):
                copies = max(1, min(count, MOST_BYTES // (4 * m * n)))
                for rank in (None, *surveyed_ranks(m, n)):
                    graphs += _written((m, n), rank, copies, tokens, modes, folder)
    return graphs


def _written(
    shape: Shape, rank: int | None, copies: int, tokens: int, modes: Sequence[str], folder: Path
) -> Iterator[LayerGraph]:
    """The graphs of one shape at one rank, None for dense."""
    name = f"{case_of(shape)}-{'dense' if rank is None else f'r{rank}'}"
    source = folder / f"{name}-{FLOAT32}.onnx"
    ir.save(layer_graph(*shape, rank, copies, tokens), source)
    for mode in modes:
        path = folder / f"{name}-{mode}.onnx"
        if mode != FLOAT32:
            quantize_graph(source, path, mode, partial(_sample, shape, tokens), may_grow=True)
        yield LayerGraph(f"{name}-{mode}", mode, shape, rank, copies, path)


def layer_input(shape: Shape, tokens: int) -> dict[str, np.ndarray]:
    """What the graphs of a shape are fed."""
    return {"x": np.random.default_rng(0).standard_normal((tokens, shape[1]), dtype=np.float32)}


def _sample(shape: Shape, tokens: int) -> Iterator[dict[str, np.ndarray]]:
    yield layer_input(shape, tokens)


def understood(
    rows: Sequence[Row],
    layers: Layers,
    graphs: Sequence[LayerGraph],
    anchors: Sequence[Anchor],
    penalties: Mapping[str, float],
    tokens: int,
) -> dict[Setup, Knowledge]:
    """What the target's rows (model, threads, p50_ms, p95_ms, peak_mb) tell of every mode and number of threads.

    Args:
        penalties: what each mode costs the dense model, in nats.
    """
    threads = sorted({row["threads"] for row in rows})
    told = {(row["model"], row["threads"]): row for row in rows}
    modes = dict.fromkeys(anchor.mode for anchor in anchors)
    known = {}
    for mode in modes:
        own = [graph for graph in graphs if graph.mode == mode]
        whole = [anchor for anchor in anchors if anchor.mode == mode]
        for count in threads:
            times = _times(own, {p.slug: told[p.slug, count]["p50_ms"] for p in own}, Setting(count, tokens))
            setup = Setup(mode, count)
            known[setup] = _knowledge(
                setup, times, whole, {a.slug: told[a.slug, count] for a in whole}, layers, penalties
            )
    return known


def _times(graphs: Sequence[LayerGraph], p50_ms: Mapping[str, float], setting: Setting) -> RankTimes:
    curves = {}
    for shape in dict.fromkeys(graph.shape for graph in graphs):
        own = {p.rank: p50_ms[p.slug] / 1e3 / p.copies for p in graphs if p.shape == shape}
        ranks = sorted(rank for rank in own if rank is not None)
        curves[shape] = Curve(own[None], tuple(ranks), tuple(own[rank] for rank in ranks))
    return RankTimes(setting, curves)


def _knowledge(
    setup: Setup,
    times: RankTimes,
    anchors: Sequence[Anchor],
    told: Mapping[str, Row],
    layers: Layers,
    penalties: Mapping[str, float],
) -> Knowledge:
    def line(y: Mapping[str, float]) -> Line:
        return Line.through((anchor.parameters, y[anchor.slug]) for anchor in anchors)

    seconds = {anchor.slug: sum(times.cost(*unit) for unit in anchor.units) for anchor in anchors}
    memory = {slug: row.get("peak_mb") for slug, row in told.items()}
    return Knowledge(
        setup,
        cache(times.cost),  # asked for the same ranks over and over
        latency=Line.through((seconds[anchor.slug], told[anchor.slug]["p50_ms"]) for anchor in anchors),
        tail=median(row["p95_ms"] / row["p50_ms"] for row in told.values()),
        size=line({anchor.slug: anchor.size_mb for anchor in anchors}),
        memory=None if None in memory.values() else line({slug: float(mb or 0) for slug, mb in memory.items()}),
        penalty=penalties.get(setup.mode, 0.0),
    )
