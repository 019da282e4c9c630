"""What each stage of a run costs, before it is done: operations counted from shapes, steps and samples, at the pace of
this machine, and times that hardly depend on them. Within a factor of about two on the CPU; of what is done in vain,
such as trials that are given up early, nothing is known."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from prehab_export.config import AUTO, BenchConfig, RunConfig, TrainConfig
from prehab_export.linalg import GRIDS
from prehab_export.pipeline.pace import Pace
from prehab_export.pipeline.workload import Workload

# Products of matrices of size n that an eigendecomposition takes as long as, halved: 13 n³ operations.
EIGEN = 13
# Seconds on the machine of `pace.REFERENCE_LOOPS`: of a process that loads torch and onnxruntime, of one that loads
# onnxruntime alone, of an exported block and of an export besides.
PROCESS, WORKER, BLOCK, EXPORT = 5.0, 0.8, 0.6, 1.0
# Seconds of one pass or one step through a block, and of one part of the model's bookkeeping, whatever its size.
PASS, STAGE = 0.001, 0.5
# Bytes that are read or written for each number that an operation gives.
TOUCHED = 5
# A graph in ONNX Runtime, fused, against the same model in PyTorch.
FUSED = 0.7
# Bytes a second: of reading and writing weights, and of a decoder that reads its weights for each token.
DISK, STREAM = 5e8, 8e9


@dataclass(frozen=True)
class Counts:
    """Samples of each kind."""

    calibration: int
    held_out: int
    evaluation: int


@dataclass(frozen=True)
class Work:
    """float32, float64: operations. seconds: on the machine on which fixed times were taken."""

    float32: float = 0.0
    float64: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        parts = (self.float32 + other.float32, self.float64 + other.float64, self.seconds + other.seconds)
        return Work(*parts)

    def times(self, factor: float) -> "Work":
        return Work(self.float32 * factor, self.float64 * factor, self.seconds * factor)

    def at(self, pace: Pace) -> float:
        """Seconds."""
        return self.float32 / pace.float32 + self.float64 / pace.float64 + self.seconds * pace.slowness


@dataclass(frozen=True)
class Effort:
    """The work of each stage.

    kept: the share of the selected layers' operations that the compressed model keeps.
    """

    config: RunConfig
    load: Workload
    counts: Counts
    kept: float

    @property
    def _compressed(self) -> float:
        """The compressed model's forward pass over the dense one's."""
        linear = sum(2 * layer.m * layer.n * layer.rows for layer in self.load.layers)
        return 1 - (1 - self.kept) * min(1.0, linear / max(self.load.flops, 1.0))

    def of(self, stage: str) -> Work:
        """The work of one stage, when it is wanted."""
        stages: dict[str, Callable[[], Work]] = {
            "merge": lambda: self._model().times(3),
            "calibrate": lambda: self._model() + self._moments(),
            "times": self._times,
            "prehab": self._prehab,
            "truncate": lambda: self._model().times(3) + self._compress(),
            "refine": self._refine,
            "rehab": self._rehab,
            "export": lambda: self._model().times(2) + self._export(),
            "baseline": lambda: self._model().times(2) + self._export() + self._judged(self.counts.evaluation, 1.0),
            "verify": self._verify,
            "quantize": self._quantize,
            "ort": lambda: Work(seconds=2.0 * (1 + len(self.config.quantize))),
            "artifact": lambda: Work(seconds=STAGE),
            "bench": self._bench,
            "report": lambda: Work(seconds=2 * STAGE),
        }
        return stages[stage]() + Work(seconds=STAGE)

    def _model(self) -> Work:
        """Reading a model or writing it, once."""
        return Work(seconds=0.2 + 4 * self.load.parameters / DISK)

    def _passes(self, samples: float, factor: float, batch: int) -> Work:
        """Passes of ``factor`` forward passes of the dense model each."""
        overhead = PASS * self.load.blocks * max(1.0, samples / batch) * max(1.0, factor)
        moved = samples * factor * TOUCHED * self.load.activations / STREAM
        return Work(float32=samples * self.load.flops * factor, seconds=overhead + moved)

    def _judged(self, samples: int, factor: float) -> Work:
        return self._passes(samples, factor, self.config.data.batch_size)

    def _moments(self, samples: float | None = None) -> Work:
        samples = self.counts.calibration if samples is None else samples
        gradients = self.config.needs_gradients
        inputs = sum(2 * group[0].n ** 2 * group[0].rows for group in self.load.inputs.values())
        outputs = sum(2 * layer.m**2 * layer.rows for layer in self.load.layers) if gradients else 0.0
        passes = self._passes(samples, 2.0 if gradients else 1.0, self.config.data.batch_size)
        return passes + Work(float32=samples * (inputs + outputs))

    def _decompositions(self, jointly: bool) -> Work:
        operations = 0.0
        for layer in self.load.layers:
            low, high = sorted((layer.m, layer.n))
            operations += (layer.m**3 + layer.n**3) / 3 + 2 * low * high * high + 8 * low * low * high + EIGEN * low**3
        for group in self.load.inputs.values() if jointly else ():
            if len(group) > 1:
                n, stacked = group[0].n, sum(layer.m for layer in group)
                operations += (EIGEN + 1) * n**3 + 2 * sum(layer.m**2 * n for layer in group) + 4 * stacked * n * n
        return Work(float64=operations, seconds=0.002 * len(self.load.layers))

    def _compress(self) -> Work:
        """Decompositions, and the walk along the compressed model that fits each layer to what comes before it."""
        cut, load = self.config.cut, self.load
        work = self._decompositions(cut.share_inputs and cut.needs_gradients)
        if cut.objective == AUTO:
            kinds = len({layer.kind for layer in load.layers})
            work += work + self._judged(self.counts.held_out, 1.0).times(kinds)
        if not cut.drift_correction or cut.objective == "weight":
            return work
        inputs = len(load.inputs) / load.blocks
        looks = self._judged(self.counts.calibration, 1 + self._compressed).times(0.6 * inputs + 1)
        sums = sum(4 * group[0].n ** 2 * group[0].rows for group in load.inputs.values())
        fits = sum(layer.n**3 + 4 * layer.m * layer.n**2 for layer in load.layers)
        work += looks + Work(float32=self.counts.calibration * sums, float64=fits) + self._decompositions(False)
        if steps := self.config.refine.block_steps:
            batch = self.config.refine.schedule.batch_size
            work += self._passes(steps * batch, 1 + 3 * self._compressed, batch) + self._eigenbases(steps)
        return work

    def _eigenbases(self, steps: int) -> Work:
        """Bases of the factors, and steps in them."""
        load = self.load
        bases = sum(group[0].n ** 3 for group in load.inputs.values()) + sum(layer.m**3 for layer in load.layers)
        ranks = [self.kept * layer.m * layer.n / (layer.m + layer.n) for layer in load.layers]
        turns = sum(6 * r * (layer.m**2 + layer.n**2) for r, layer in zip(ranks, load.layers, strict=True))
        return Work(float32=EIGEN * bases + steps * turns)

    def _prehab(self) -> Work:
        options, schedule = self.config.prehab, self.config.prehab.train

        def trained(steps: int) -> Work:
            factor = 3.0 + (1.0 if schedule.distill else 0.0)
            refreshes = steps // options.refresh_every
            training = self._passes(steps * schedule.batch_size, factor, schedule.batch_size)
            surrogates = self._decompositions(False).times(steps / options.every / 4)
            fresh = self._moments(options.refresh_samples) + self._decompositions(True)
            updates = Work(seconds=steps * 16 * self.load.parameters / STREAM)
            return training + surrogates + fresh.times(refreshes + 1) + self._moments() + updates

        guard = self._compress() + self._judged(self.counts.held_out, self._compressed)
        work = self._model().times(2) + trained(schedule.steps)
        work += self._judged(self.counts.held_out, 1.0).times(2 + schedule.steps // options.refresh_every)
        work += guard.times(2 if options.guard else 0)
        if options.strength == AUTO:
            work += (trained(max(1, schedule.steps // 4)) + guard).times(options.trials)
        return work

    def _refine(self) -> Work:
        schedule = self.config.refine.schedule
        training = self._passes(schedule.steps * schedule.batch_size, 1 + 3 * self._compressed, schedule.batch_size)
        judged = self._judged(self.counts.held_out, self._compressed).times(2)
        return self._model().times(3) + training + self._eigenbases(schedule.steps) + judged

    def _rehab(self) -> Work:
        schedule: TrainConfig = self.config.rehab.train
        factor = 3 * self._compressed + (1.0 if schedule.distill else 0.0)
        training = self._passes(schedule.steps * schedule.batch_size, factor, schedule.batch_size)
        bases = self._eigenbases(schedule.steps) if self.config.rehab.method != "lora" else Work()
        judged = self._judged(self.counts.held_out, self._compressed).times(2)
        return self._model().times(3) + training + bases + judged

    def _export(self) -> Work:
        return Work(seconds=EXPORT + BLOCK * self.load.blocks)

    def _verify(self) -> Work:
        """In a process of its own: the compressed model in PyTorch, and both graphs."""
        graphs = self._judged(self.counts.evaluation, 1 + self._compressed).times(FUSED)
        model = self._judged(self.counts.evaluation, self._compressed)
        return Work(seconds=PROCESS) + self._model().times(3) + model + graphs

    def _quantize(self) -> Work:
        work = Work()
        for mode in self.config.quantize:
            made = Work(seconds=1.0) + self._model().times(2)
            judged = self._judged(self.counts.evaluation, 1 + self._compressed).times(FUSED)
            work += made.times(2) + judged
            if self.config.quantize_refit and mode in GRIDS:
                held_out = self._judged(self.counts.held_out, self._compressed).times(2)
                fits = self._decompositions(False).times(2)
                again = self._judged(self.counts.evaluation, self._compressed)
                work += made + fits + (held_out + again).times(FUSED)
        return work

    def _times(self) -> Work:
        shapes = {(layer.m, layer.n) for layer in self.load.layers}
        return Work(seconds=4.0 * len(shapes))

    def _bench(self) -> Work:
        bench = self.config.bench
        models, cases = 2 + 2 * len(self.config.quantize), _cases(self.config, bench)
        request = self._request(bench)
        turn = Work(seconds=bench.min_seconds) if request.seconds <= bench.min_seconds else request
        each = (turn.times(bench.rounds) + Work(seconds=3 * WORKER) + request.times(bench.warmup)).times(models)
        return each.times(cases) + Work(seconds=3.0 * max(1, len(bench.thread_counts)))

    def _request(self, bench: BenchConfig) -> Work:
        rows = max((layer.rows for layer in self.load.layers), default=1.0)
        tokens = rows if self.config.task == "image-classification" else max(bench.sequence_lengths)
        operations = self.load.flops * tokens / max(rows, 1.0) * max(bench.batch_sizes)
        decoding = bench.new_tokens * 4 * self.load.parameters / STREAM if self.config.task == "text-generation" else 0
        return Work(seconds=operations / REQUESTS + decoding)


# Operations a second of a request, to see whether it outlasts the least turn.
REQUESTS = 5e10


def _cases(config: RunConfig, bench: BenchConfig) -> int:
    lengths = 1 if config.task == "image-classification" else len(bench.sequence_lengths)
    return prod((max(1, len(bench.thread_counts)), len(bench.batch_sizes), lengths))
