"""How long a linear layer takes on this machine's ONNX Runtime: dense, and as two factors at any rank.

Kernels do not cost what their parameters say: a product with a narrow side runs below the machine's peak, and one token
at a time waits for memory. So each shape that a model has is timed at a few ranks, with as many copies of the layer as
the model has, so that its weights come from where they will come from, cache or memory. Between measured ranks the time
is interpolated. What was measured once for a machine, runtime, number of threads and of tokens is kept for later runs.
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

# The lowest rank measured, and how many of them.
LOWEST, POINTS = 8, 8
# Beyond this nothing stays in a cache, and more copies tell no more.
MOST_BYTES = 64_000_000
ROUNDS, TURN_SECONDS = 7, 0.01
# Another number where the way of measuring changes in what none of those above says.
METHOD = 2


@dataclass(frozen=True)
class Setting:
    """threads: of ONNX Runtime. tokens: rows that go through a layer at a time."""

    threads: int
    tokens: int


@dataclass(frozen=True)
class Curve:
    """Seconds of one layer of a shape: ``dense``, and as two factors at ``ranks``, rising."""

    dense: float
    ranks: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rank: int) -> float:
        """Seconds at any rank from 1 on, on straight lines through the measured ones, which no rank goes below.

        >>> Curve(1.0, (8, 16), (0.2, 0.4)).at(12)
        0.30000000000000004
        """
        rising = list(accumulate(self.seconds, max))  # a shorter time at a higher rank is noise
        place = min(max(bisect_left(self.ranks, rank), 1), len(self.ranks) - 1)
        if len(self.ranks) == 1:
            return rising[0]
        (r0, r1), (t0, t1) = self.ranks[place - 1 : place + 1], rising[place - 1 : place + 1]
        return max(t0 + (t1 - t0) * (rank - r0) / (r1 - r0), rising[0] if rank < self.ranks[0] else 0.0)


@dataclass(frozen=True)
class RankTimes:
    """The curves of a model's shapes, (m, n) being out×in."""

    setting: Setting
    curves: Mapping[Shape, Curve]

    def cost(self, m: int, n: int, rank: int | None) -> float:
        """Seconds of one m×n layer, None for dense: a cost to allocate by."""
        curve = self.curves[m, n]
        return curve.dense if rank is None else curve.at(rank)

    def to_json(self) -> dict:
        curves = [{"shape": list(shape), **asdict(curve)} for shape, curve in self.curves.items()]
        return {"setting": asdict(self.setting), "machine": machine_facts(), "curves": curves}

    @classmethod
    def from_json(cls, values: Mapping) -> "RankTimes":
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
    """Time every shape that the layers have.

    Args:
        shapes: (m, n) of each layer, as often as it occurs.
        cache: a folder to look measurements up in, and to keep them in.
    """
    counts, curves = Counter(shapes), {}
    with progress("time layers", len(counts)) as advance:
        for (m, n), count in counts.items():
            with step(advance, f"{m}×{n}"):
                curves[m, n] = _curve(m, n, max(1, min(count, MOST_BYTES // (4 * m * n))), setting, cache)
    return RankTimes(setting, curves)


def rank_times_folder() -> Path:
    """Where measurements are kept for later runs."""
    return cache_folder() / "rank-times"


def _curve(m: int, n: int, copies: int, setting: Setting, cache: Path | None) -> Curve:
    """Looked up, or measured and kept."""
    file = None if cache is None else cache / f"{_key(m, n, copies, setting)}.json"
    if file is not None and file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        return Curve(values["dense"], tuple(values["ranks"]), tuple(values["seconds"]))
    curve = _measured(m, n, copies, setting)
    if file is not None:
        _keep(file, curve)
    return curve


def measured_ranks(m: int, n: int) -> tuple[int, ...]:
    """The ranks to measure: evenly spread on a logarithmic scale up to break-even, in multiples of the lowest.

    >>> measured_ranks(768, 768)
    (8, 16, 24, 40, 72, 128, 224, 384)
    """
    most = break_even(m, n)
    if most <= LOWEST:
        return (most,)
    spread = np.geomspace(LOWEST, most, POINTS)
    return tuple(sorted({min(most, max(LOWEST, LOWEST * round(rank / LOWEST))) for rank in spread} | {most}))


def _measured(m: int, n: int, copies: int, setting: Setting) -> Curve:
    ranks = measured_ranks(m, n)
    runs = [_runner(m, n, rank, copies, setting) for rank in (None, *ranks)]
    for run in runs:
        run()  # ONNX Runtime plans its memory on the first run
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):  # in turns, so that a change of the machine's pace meets all of them
        for run, own in zip(runs, times, strict=True):
            run()  # brings back what the others have pushed out of the caches
            own.append(_seconds(run) / copies)
    dense, *factored = (median(own) for own in times)
    return Curve(dense, ranks, tuple(factored))


def _seconds(run: Callable[[], None]) -> float:
    """Mean seconds of a run over a short turn."""
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < TURN_SECONDS or not count:
        run()
        count += 1
    return passed / count


def _runner(m: int, n: int, rank: int | None, copies: int, setting: Setting) -> Callable[[], None]:
    """One run of ``copies`` layers with weights of their own, all reading one input."""
    graph = ir.serde.serialize_model(layer_graph(m, n, rank, copies, setting.tokens)).SerializeToString()
    session = onnxruntime.InferenceSession(graph, session_options(setting.threads), providers=[CPU])
    binding = session.io_binding()  # outputs stay where they are: what allocating them takes is no layer's cost
    x = np.random.default_rng(0).standard_normal((setting.tokens, n), dtype=np.float32)
    binding.bind_cpu_input("x", x)
    for output in session.get_outputs():
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type((setting.tokens, m), np.float32)
        binding.bind_ortvalue_output(output.name, value)
    return lambda: session.run_with_iobinding(binding)


def layer_graph(m: int, n: int, rank: int | None, copies: int, tokens: int) -> ir.Model:
    """``copies`` m×n layers side by side, each with weights of its own, reading one input ``x`` (tokens×n)."""
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


def _key(m: int, n: int, copies: int, setting: Setting) -> str:
    """What a measurement depends on. The method is part of it: its numbers are in this file."""
    facts = machine_facts()
    known = [facts["cpu"], facts["vector_extensions"], facts["available_cores"], facts["libraries"]["onnxruntime"]]
    text = json.dumps([*known, m, n, copies, asdict(setting), METHOD, LOWEST, POINTS, ROUNDS, TURN_SECONDS])
    return sha256_of_text(text)[:24]


def _keep(file: Path, curve: Curve) -> None:
    """Where there is no room, or no right to write, it is measured again the next time: that is no reason to fail."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        publish_text(file, json.dumps(asdict(curve)))
