"""Measured times of linear layers on this machine's ONNX Runtime: dense, and as two factors at any rank.

The time of a kernel is not proportional to its parameters: a product with a narrow side runs below the machine's peak
rate, and a single token waits for memory. So each shape of a model is timed at a few ranks. The timed graph has as many
copies of the layer as the model, so that its weights come from a cache or from memory as they do in the model. Times
between the measured ranks are interpolated. Measurements are cached for each machine, runtime, number of threads and
number of tokens.
"""

import json
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir
import onnxruntime

from converters.onnx.runtime import CPU, session_options
from converters.publishing import publish_text
from prehab_export.linalg import break_even
from prehab_export.system import Progress, cache_folder, machine_facts, sha256_of_text, silent, step

Shape = tuple[int, int]

# The lowest measured rank, and the number of measured ranks.
LOWEST, POINTS = 8, 8
# More weights than this stay in no cache, so more copies of a layer would not change its time.
MAX_BYTES = 64_000_000
ROUNDS, TURN_SECONDS = 7, 0.01
# Version of the method. It changes with the method, unless one of the constants above changes too.
METHOD = 2


@dataclass(frozen=True)
class Setting:
    """The conditions of a measurement.

    threads: threads of ONNX Runtime. tokens: number of rows that a layer processes at a time.
    """

    threads: int
    tokens: int


@dataclass(frozen=True)
class Curve:
    """The seconds that a layer of one shape takes: ``dense``, and as two factors at each of the rising ``ranks``."""

    dense: float
    ranks: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rank: int) -> float:
        """Return the seconds at a rank of 1 or more, interpolated linearly.

        A higher rank is never faster than a lower one. Below the lowest measured rank, the time is constant.

        >>> Curve(1.0, (8, 16), (0.2, 0.4)).at(12)
        0.30000000000000004
        """
        times = list(accumulate(self.seconds, max))  # a shorter time at a higher rank is noise
        if len(self.ranks) == 1:
            return times[0]
        right = min(max(bisect_left(self.ranks, rank), 1), len(self.ranks) - 1)
        (r0, r1), (t0, t1) = self.ranks[right - 1 : right + 1], times[right - 1 : right + 1]
        return max(t0 + (t1 - t0) * (rank - r0) / (r1 - r0), times[0] if rank < self.ranks[0] else 0.0)


@dataclass(frozen=True)
class RankTimes:
    """The curves of all layer shapes (out, in) of a model."""

    setting: Setting
    curves: Mapping[Shape, Curve]

    def cost(self, m: int, n: int, rank: int | None) -> float:
        """Return the seconds of one m×n layer at a rank (None for dense), as a cost for rank allocation."""
        curve = self.curves[m, n]
        return curve.dense if rank is None else curve.at(rank)

    def to_json(self) -> dict:
        """Return the times as JSON types, with the facts of this machine."""
        curves = [{"shape": list(shape), **asdict(curve)} for shape, curve in self.curves.items()]
        return {"setting": asdict(self.setting), "machine": machine_facts(), "curves": curves}

    @classmethod
    def from_json(cls, values: Mapping) -> "RankTimes":
        """Build the times from the values that `to_json` returns."""
        curves = {
            (row["shape"][0], row["shape"][1]): Curve(row["dense"], tuple(row["ranks"]), tuple(row["seconds"]))
            for row in values["curves"]
        }
        return cls(Setting(**values["setting"]), curves)


def measure_rank_times(
    shapes: Iterable[Shape],
    setting: Setting,
    *,
    cache: Path | None = None,
    progress: Progress = silent,
) -> RankTimes:
    """Measure the times of every layer shape.

    Args:
        shapes: the shape (out, in) of each layer; equal layers repeat it.
        cache: folder of cached measurements, which is read and added to.
    """
    counts, curves = Counter(shapes), {}
    with progress("time layers", len(counts)) as advance:
        for (m, n), count in counts.items():
            with step(advance, f"{m}×{n}"):
                copies = max(1, min(count, MAX_BYTES // (4 * m * n)))
                curves[m, n] = _load_or_measure(m, n, copies, setting, cache)
    return RankTimes(setting, curves)


def rank_times_folder() -> Path:
    """Return the default folder of cached measurements."""
    return cache_folder() / "rank-times"


def _load_or_measure(m: int, n: int, copies: int, setting: Setting, cache: Path | None) -> Curve:
    """Return the cached curve, or measure the curve and cache it."""
    file = None if cache is None else cache / f"{_cache_key(m, n, copies, setting)}.json"
    if file is not None and file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        return Curve(values["dense"], tuple(values["ranks"]), tuple(values["seconds"]))
    curve = _measure(m, n, copies, setting)
    if file is not None:
        _store(file, curve)
    return curve


def measured_ranks(m: int, n: int) -> tuple[int, ...]:
    """Return the ranks to measure: evenly spaced on a logarithmic scale up to break-even, in multiples of the lowest.

    >>> measured_ranks(768, 768)
    (8, 16, 24, 40, 72, 128, 224, 384)
    """
    highest = break_even(m, n)
    if highest <= LOWEST:
        return (highest,)
    spaced = np.geomspace(LOWEST, highest, POINTS)
    return tuple(sorted({min(highest, max(LOWEST, LOWEST * round(rank / LOWEST))) for rank in spaced} | {highest}))


def _measure(m: int, n: int, copies: int, setting: Setting) -> Curve:
    ranks = measured_ranks(m, n)
    runs = [_make_run(m, n, rank, copies, setting) for rank in (None, *ranks)]
    for run in runs:
        run()  # ONNX Runtime plans its memory in the first run
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):  # in turns, so that a change of the machine's speed affects all ranks
        for run, run_times in zip(runs, times, strict=True):
            run()  # refills the caches that the other runs have used
            run_times.append(_time_run(run) / copies)
    dense, *factored = (median(run_times) for run_times in times)
    return Curve(dense, ranks, tuple(factored))


def _time_run(run: Callable[[], None]) -> float:
    """Return the mean seconds of a run over a short turn."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < TURN_SECONDS or not count:
        run()
        count += 1
    return elapsed / count


def _make_run(m: int, n: int, rank: int | None, copies: int, setting: Setting) -> Callable[[], None]:
    """Return a function that runs ``copies`` layers with different weights on the same input."""
    graph = ir.serde.serialize_model(layer_graph(m, n, rank, copies, setting.tokens)).SerializeToString()
    session = onnxruntime.InferenceSession(graph, session_options(setting.threads), providers=[CPU])
    binding = session.io_binding()  # reuses the outputs, because allocating them is not part of a layer's time
    x = np.random.default_rng(0).standard_normal((setting.tokens, n), dtype=np.float32)
    binding.bind_cpu_input("x", x)
    for output in session.get_outputs():
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type((setting.tokens, m), np.float32)
        binding.bind_ortvalue_output(output.name, value)
    return lambda: session.run_with_iobinding(binding)


def layer_graph(m: int, n: int, rank: int | None, copies: int, tokens: int) -> ir.Model:
    """Build a graph of ``copies`` parallel m×n layers with different weights and one input ``x`` (tokens×n).

    Args:
        rank: rank of the two factors of each layer; None for dense layers.
    """
    generator = np.random.default_rng(0)
    x = ir.val("x", ir.DataType.FLOAT, [tokens, n])
    graph = ir.Graph([x], [], nodes=[], name="layers", opset_imports={"": 20})
    for copy in range(copies):
        value = x
        widths = (n, m) if rank is None else (n, rank, m)
        for part, (rows, columns) in enumerate(pairwise(widths)):
            array = generator.standard_normal((rows, columns), dtype=np.float32) / np.float32(rows**0.5)
            name, kind = f"weight_{copy}_{part}", ir.TensorType(ir.DataType.FLOAT)
            tensor = ir.tensor(array, name=name)
            weight = ir.Value(name=name, type=kind, shape=ir.Shape([rows, columns]), const_value=tensor)
            graph.register_initializer(weight)
            node = ir.node("MatMul", [value, weight])
            graph.append(node)
            value = node.outputs[0]
        value.name, value.type, value.shape = f"y_{copy}", ir.TensorType(ir.DataType.FLOAT), ir.Shape([tokens, m])
        graph.outputs.append(value)
    return ir.Model(graph, ir_version=10)


def _cache_key(m: int, n: int, copies: int, setting: Setting) -> str:
    """Return a digest of everything that a measurement depends on, the method and its constants included."""
    facts = machine_facts()
    machine = [facts["cpu"], facts["vector_extensions"], facts["available_cores"], facts["libraries"]["onnxruntime"]]
    text = json.dumps([*machine, m, n, copies, asdict(setting), METHOD, LOWEST, POINTS, ROUNDS, TURN_SECONDS])
    return sha256_of_text(text)[:24]


def _store(file: Path, curve: Curve) -> None:
    """Cache a curve. If the file cannot be written, the next run measures again."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        publish_text(file, json.dumps(asdict(curve)))
