"""Estimates of the time that each stage of a run takes.

An estimate counts operations from shapes, steps and samples, divides them by this machine's measured pace, and adds
fixed times. It is right within a factor of about two on the CPU. It does not account for work that is abandoned, such
as trials that stop early.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod

from prehab_export.config import AUTO, BenchConfig, RunConfig, TrainConfig
from prehab_export.linalg import GRIDS
from prehab_export.pipeline.pace import Pace
from prehab_export.pipeline.workload import Workload

# An eigendecomposition of an n×n matrix takes as long as 13 n³ operations of a matrix product.
EIGEN_COST = 13
# Seconds on the machine of `pace.REFERENCE_LOOPS`: to start a process that loads torch and onnxruntime, to start one
# that loads onnxruntime alone, to export one block, and the fixed part of an export.
PROCESS, WORKER, EXPORT_BLOCK, EXPORT = 5.0, 0.8, 0.6, 1.0
# Fixed seconds of one pass or step through a block, and of one stage, whatever the sizes.
PASS_OVERHEAD, STAGE_OVERHEAD = 0.001, 0.5
# Bytes read or written for each number that an operation produces.
BYTES_PER_NUMBER = 5
# Time of a fused graph in ONNX Runtime over that of the same model in PyTorch.
FUSED_SHARE = 0.7
# Bytes per second: of weight files on disk, and of weights and activations in memory.
DISK_BANDWIDTH, MEMORY_BANDWIDTH = 5e8, 8e9
# Operations per second within a benchmarked request, to tell whether it takes longer than a round's minimum time.
REQUEST_RATE = 5e10


@dataclass(frozen=True)
class Counts:
    """The number of samples in each part of the data."""

    calibration: int
    held_out: int
    evaluation: int


@dataclass(frozen=True)
class Work:
    """An amount of work.

    float32, float64: floating-point operations.
    seconds: fixed time on the reference machine of `pace.REFERENCE_LOOPS`.
    """

    float32: float = 0.0
    float64: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        parts = (self.float32 + other.float32, self.float64 + other.float64, self.seconds + other.seconds)
        return Work(*parts)

    def times(self, factor: float) -> "Work":
        return Work(self.float32 * factor, self.float64 * factor, self.seconds * factor)

    def at(self, pace: Pace) -> float:
        """Return the seconds that the work takes at this pace."""
        return self.float32 / pace.float32 + self.float64 / pace.float64 + self.seconds * pace.slowness


@dataclass(frozen=True)
class Effort:
    """The work of each stage of a run.

    kept_share: the share of the selected layers' operations that remains in the compressed model.
    dense_graph: whether the run has a graph of the dense model.
    """

    config: RunConfig
    workload: Workload
    counts: Counts
    kept_share: float
    dense_graph: bool = True

    @property
    def _compressed_cost(self) -> float:
        """The operations of the compressed model's forward pass over those of the dense model's."""
        linear = sum(2 * layer.m * layer.n * layer.rows for layer in self.workload.layers)
        return 1 - (1 - self.kept_share) * min(1.0, linear / max(self.workload.flops, 1.0))

    def stage_work(self, stage: str) -> Work:
        """Return the work of a stage that the options enable."""
        stages: dict[str, Callable[[], Work]] = {
            "merge": lambda: self._model().times(3),
            "calibrate": lambda: self._model() + self._moments(),
            "times": self._times,
            "prehab": self._prehab,
            "truncate": lambda: self._model().times(3) + self._compress(),
            "refine": self._refine,
            "rehab": self._rehab,
            "export": lambda: self._model().times(2) + self._export(),
            "baseline": lambda: (
                self._model().times(2) + self._export() + self._evaluate(self.counts.evaluation, FUSED_SHARE)
            ),
            "verify": self._verify,
            "quantize": self._quantize,
            "ort": lambda: Work(seconds=2.0 * (1 + len(self.config.quantize))),
            "artifact": lambda: Work(seconds=STAGE_OVERHEAD),
            "bench": self._bench,
            "report": lambda: Work(seconds=2 * STAGE_OVERHEAD),
        }
        return stages[stage]() + Work(seconds=STAGE_OVERHEAD)

    def _model(self) -> Work:
        """Return the work of reading or writing a model once."""
        return Work(seconds=0.2 + 4 * self.workload.parameters / DISK_BANDWIDTH)

    def _passes(self, samples: float, factor: float, batch: int) -> Work:
        """Return the work of passing samples through a model.

        Args:
            factor: the operations of one pass over those of the dense model's forward pass.
            batch: samples in a batch.
        """
        overhead = PASS_OVERHEAD * self.workload.blocks * max(1.0, samples / batch) * max(1.0, factor)
        traffic = samples * factor * BYTES_PER_NUMBER * self.workload.activations / MEMORY_BANDWIDTH
        return Work(float32=samples * self.workload.flops * factor, seconds=overhead + traffic)

    def _evaluate(self, samples: int, factor: float) -> Work:
        return self._passes(samples, factor, self.config.data.batch_size)

    def _moments(self, samples: float | None = None) -> Work:
        samples = self.counts.calibration if samples is None else samples
        inputs = sum(2 * group[0].n ** 2 * group[0].rows for group in self.workload.inputs.values())
        work = self._passes(samples, 1.0, self.config.data.batch_size) + Work(float32=samples * inputs)
        if not self.config.needs_gradients:
            return work
        rows = max((layer.rows for layer in self.workload.layers), default=1.0)
        units = rows if self.config.task == "text-generation" else 1.0
        samples = min(samples, ceil(self.config.calibrate.gradient_units / units))
        outputs = sum(2 * layer.m**2 * layer.rows for layer in self.workload.layers)
        # Every block once more, and backward.
        return work + self._passes(samples, 2.0, self.config.data.batch_size) + Work(float32=samples * outputs)

    def _decompositions(self, jointly: bool) -> Work:
        operations = 0.0
        for layer in self.workload.layers:
            low, high = sorted((layer.m, layer.n))
            eigen = EIGEN_COST * low**3
            operations += (layer.m**3 + layer.n**3) / 3 + 2 * low * high * high + 8 * low * low * high + eigen
        for group in self.workload.inputs.values() if jointly else ():
            if len(group) > 1:
                n, stacked = group[0].n, sum(layer.m for layer in group)
                operations += (EIGEN_COST + 1) * n**3 + 2 * sum(layer.m**2 * n for layer in group) + 4 * stacked * n * n
        return Work(float64=operations, seconds=0.002 * len(self.workload.layers))

    def _compress(self) -> Work:
        """Return the work of the decompositions and of drift correction, which refits each layer in turn."""
        cut, workload = self.config.cut, self.workload
        work = self._decompositions(cut.share_inputs and cut.needs_gradients)
        if cut.objective == AUTO:
            kinds = len({layer.kind for layer in workload.layers})
            work += work + self._evaluate(self.counts.held_out, 1.0).times(kinds)
        if not cut.drift_correction or cut.objective == "weight":
            return work
        # The dense blocks run once, the compressed ones for each input of their layers, mostly in part.
        passes = self._evaluate(self.counts.calibration, 1 + 2 * self._compressed_cost)
        moments = sum(4 * group[0].n ** 2 * group[0].rows for group in workload.inputs.values())
        fits = sum(layer.n**3 + 4 * layer.m * layer.n**2 for layer in workload.layers)
        work += passes + Work(float32=self.counts.calibration * moments, float64=fits) + self._decompositions(False)
        if steps := self.config.refine.block_steps:
            batch = self.config.refine.schedule.batch_size
            work += self._passes(steps * batch, 1 + 3 * self._compressed_cost, batch) + self._eigenbases(steps)
        return work

    def _eigenbases(self, steps: int) -> Work:
        """Return the work of finding the factors' eigenbases and of rotating into them at every step."""
        layers = self.workload.layers
        bases = sum(group[0].n ** 3 for group in self.workload.inputs.values()) + sum(layer.m**3 for layer in layers)
        ranks = [self.kept_share * layer.m * layer.n / (layer.m + layer.n) for layer in layers]
        rotations = sum(6 * r * (layer.m**2 + layer.n**2) for r, layer in zip(ranks, layers, strict=True))
        return Work(float32=EIGEN_COST * bases + steps * rotations)

    def _prehab(self) -> Work:
        options, schedule = self.config.prehab, self.config.prehab.train

        def training_work(steps: int) -> Work:
            factor = 3.0 + (1.0 if schedule.distill else 0.0)
            refreshes = steps // options.refresh_every
            training = self._passes(steps * schedule.batch_size, factor, schedule.batch_size)
            surrogates = self._decompositions(False).times(steps / options.every / 4)
            refresh = self._moments(options.refresh_samples) + self._decompositions(True)
            updates = Work(seconds=steps * 16 * self.workload.parameters / MEMORY_BANDWIDTH)
            return training + surrogates + refresh.times(refreshes + 1) + self._moments() + updates

        guard = self._compress() + self._evaluate(self.counts.held_out, self._compressed_cost)
        work = self._model().times(2) + training_work(schedule.steps)
        work += self._evaluate(self.counts.held_out, 1.0).times(2 + schedule.steps // options.refresh_every)
        work += guard.times(2 if options.guard else 0)
        if options.strength == AUTO:
            work += (training_work(max(1, schedule.steps // 4)) + guard).times(options.trials)
        return work

    def _refine(self) -> Work:
        schedule = self.config.refine.schedule
        factor = 1 + 3 * self._compressed_cost
        training = self._passes(schedule.steps * schedule.batch_size, factor, schedule.batch_size)
        evaluation = self._evaluate(self.counts.held_out, self._compressed_cost).times(2)
        return self._model().times(3) + training + self._eigenbases(schedule.steps) + evaluation

    def _rehab(self) -> Work:
        schedule: TrainConfig = self.config.rehab.train
        factor = 3 * self._compressed_cost + (1.0 if schedule.distill else 0.0)
        training = self._passes(schedule.steps * schedule.batch_size, factor, schedule.batch_size)
        bases = self._eigenbases(schedule.steps) if self.config.rehab.method != "lora" else Work()
        evaluation = self._evaluate(self.counts.held_out, self._compressed_cost).times(2)
        return self._model().times(3) + training + bases + evaluation

    def _export(self) -> Work:
        return Work(seconds=EXPORT + EXPORT_BLOCK * self.workload.blocks)

    def _baseline(self) -> Work:
        if not self.dense_graph:
            return self._model() + self._evaluate(self.counts.evaluation, 1.0)
        evaluation = self._evaluate(self.counts.evaluation, FUSED_SHARE)
        return self._model().times(2) + self._export() + evaluation

    def _verify(self) -> Work:
        """Return the work of checking both graphs and of evaluating the compressed one, in a separate process."""
        graph = self._evaluate(self.counts.evaluation, self._compressed_cost).times(FUSED_SHARE)
        return Work(seconds=PROCESS) + self._model().times(3) + graph

    def _quantize(self) -> Work:
        work, graphs = Work(), 2 if self.dense_graph else 1
        for mode in self.config.quantize:
            quantization = Work(seconds=1.0) + self._model().times(2)
            passes = (1 if self.dense_graph else 0) + self._compressed_cost
            evaluation = self._evaluate(self.counts.evaluation, passes).times(FUSED_SHARE)
            work += quantization.times(graphs) + evaluation
            if self.config.quantize_refit and mode in GRIDS:
                held_out = self._evaluate(self.counts.held_out, self._compressed_cost).times(2)
                fits = self._decompositions(False).times(2)
                evaluation = self._evaluate(self.counts.evaluation, self._compressed_cost)
                work += quantization + fits + (held_out + evaluation).times(FUSED_SHARE)
        return work

    def _times(self) -> Work:
        shapes = {(layer.m, layer.n) for layer in self.workload.layers}
        return Work(seconds=4.0 * len(shapes))

    def _bench(self) -> Work:
        bench = self.config.bench
        models, cases = 1 + len(self.config.quantize), _case_count(self.config, bench)
        models *= 2 if self.dense_graph else 1
        request = self._request(bench)
        round_work = Work(seconds=bench.min_seconds) if request.seconds <= bench.min_seconds else request
        case = (round_work.times(bench.rounds) + Work(seconds=3 * WORKER) + request.times(bench.warmup)).times(models)
        return case.times(cases) + Work(seconds=3.0 * max(1, len(bench.thread_counts)))

    def _request(self, bench: BenchConfig) -> Work:
        rows = max((layer.rows for layer in self.workload.layers), default=1.0)
        tokens = rows if self.config.task == "image-classification" else max(bench.sequence_lengths)
        operations = self.workload.flops * tokens / max(rows, 1.0) * max(bench.batch_sizes)
        is_decoder = self.config.task == "text-generation"
        decoding = bench.new_tokens * 4 * self.workload.parameters / MEMORY_BANDWIDTH if is_decoder else 0
        return Work(seconds=operations / REQUEST_RATE + decoding)


def _case_count(config: RunConfig, bench: BenchConfig) -> int:
    lengths = 1 if config.task == "image-classification" else len(bench.sequence_lengths)
    return prod((max(1, len(bench.thread_counts)), len(bench.batch_sizes), lengths))
