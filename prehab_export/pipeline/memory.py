"""Estimates of the peak memory of each stage of a run, on top of what this process already holds."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace

from prehab_export.compression import USUAL_LIMITS, MemoryLimits
from prehab_export.config import RunConfig
from prehab_export.pipeline.workload import Workload

# The assumptions of the estimate, which the forecast quotes.
ASSUMPTION = (
    "weights mapped from their files in calibration and truncation, with one block in float32, its moments, the "
    "activations of a micro-batch and float64 work on the largest layer; models in float32 in training and export; "
    "libraries and data as they are in memory now"
)
# The share of all activations that is in memory at once, including those kept for the backward pass.
LIVE_SHARE = 0.35
# Copies of a batch's output during the forward and backward passes of its loss.
LOSS_COPIES = 4
# Bytes of libraries loaded later, and of the buffers with which the bench measures the machine's ceilings.
LIBRARIES, BENCH_CEILINGS = 250e6, 450e6
# Resident memory over memory in use: the allocator keeps some freed memory.
ALLOCATOR_OVERHEAD = 1.25
# Bytes of libraries that work by blocks loads.
BLOCKWISE_LIBRARIES = 200e6
# What the allocator keeps of the blocks' weights in float32: matrices below 32 MB are not given back to the system.
MOST_KEPT = 5e8
# Bytes of the logits that are computed together in calibration.
LOGITS = 2**26
# Samples of a trial, which passes the whole model, and copies of their logits that it compares.
TRIAL_SAMPLES, TRIAL_COPIES = 2, 5
# The least bytes of hidden states that are worth holding in memory.
LEAST_SPOOL = 2**24
# Stages that work on one block at a time.
BY_BLOCKS = ("calibrate", "truncate")
# Stages that work on the graph of the dense model.
DENSE_GRAPH_STAGES = ("baseline", "verify", "quantize", "bench")
# Copies of a model's weights during export: in a session and, while it opens, in part of the graph; and mapped files.
EXPORT_COPIES = 2
# Copies of a model's weights while a graph is quantised: the graph before and after, the written graph, and a session.
QUANTIZE_COPIES = 4


@dataclass(frozen=True)
class Need:
    """The peak memory of some work, in bytes.

    held: memory of the process alone.
    mapped: files that are mapped. If memory is short, the system drops what is not in use and reads it again.
    """

    held: float
    mapped: float = 0.0

    @property
    def total(self) -> float:
        return self.held + self.mapped


@dataclass(frozen=True)
class Memory:
    """The peak memory of each stage of a run.

    kept_share: the share of the selected layers' parameters that remains in the compressed model.
    half: whether the weights are stored in half precision, so that they are converted when they are used.
    limits: what work on samples holds at once.
    dense_graph: whether the run has a graph of the dense model.
    """

    config: RunConfig
    workload: Workload
    kept_share: float
    half: bool = False
    limits: MemoryLimits = USUAL_LIMITS
    dense_graph: bool = True

    def within(self, stages: Collection[str], held: float) -> "Memory":
        """Return the estimate with the largest limits, up to its own, that keep these stages within ``held`` bytes.

        Stages that would not fit with the smallest limits do not count, except those whose work is by blocks.
        """
        smallest = self
        while (limits := smallest._smaller_limits()) is not None:
            smallest = replace(smallest, limits=limits)
        counting = [name for name in stages if name in BY_BLOCKS or smallest.need(name).held <= held]
        memory = self
        while any(memory.need(name).held > held for name in counting):
            if (limits := memory._smaller_limits()) is None:
                break
            memory = replace(memory, limits=limits)
        return memory

    def _smaller_limits(self) -> MemoryLimits | None:
        """Return the next smaller limits: first of the hidden states, which can lie in files, then of the samples."""
        if self.limits.spool_bytes > LEAST_SPOOL:
            return replace(self.limits, spool_bytes=self.limits.spool_bytes // 2)
        if self.limits.positions > self._rows:
            return replace(self.limits, positions=self.limits.positions // 2)
        return None

    @property
    def _model(self) -> float:
        return 4.0 * self.workload.parameters

    @property
    def _compressed_model(self) -> float:
        return 4.0 * (self.workload.parameters - (1 - self.kept_share) * self.workload.selected)

    @property
    def _input_moments(self) -> float:
        return 4.0 * sum(group[0].n ** 2 for group in self.workload.inputs.values())

    @property
    def _gradient_moments(self) -> float:
        return 4.0 * sum(layer.m**2 for layer in self.workload.layers) if self.config.needs_gradients else 0.0

    @property
    def _moments(self) -> float:
        return self._input_moments + self._gradient_moments

    @property
    def _layer(self) -> float:
        """Float64 matrices while the largest layer is decomposed."""
        return max((8.0 * 4 * max(layer.m, layer.n) ** 2 for layer in self.workload.layers), default=0.0)

    @property
    def _rows(self) -> float:
        """Positions of a sample."""
        return max((layer.rows for layer in self.workload.layers), default=1.0)

    @property
    def _stored(self) -> float:
        """The weights as they are stored, mapped from their files."""
        return (0.5 if self.half else 1.0) * self._model

    @property
    def _converted(self) -> float:
        """Weights in float32 while a block, or what lies around the blocks, runs."""
        block = self.workload.selected / self.workload.blocks
        return 4.0 * (self.workload.parameters - self.workload.selected + block) if self.half else 0.0

    @property
    def _samples(self) -> float:
        """Samples in a micro-batch."""
        return min(self.config.data.batch_size, max(1.0, self.limits.positions // self._rows))

    @property
    def _block_activations(self) -> float:
        """The activations of a micro-batch in one block."""
        return 4.0 * self._samples * self.workload.activations / self.workload.blocks

    @property
    def _states(self) -> float:
        """The hidden states before all blocks, as far as they are in memory."""
        widths = Counter(layer.n for layer in self.workload.layers)
        width = max(widths, key=lambda n: widths[n], default=0)
        states = 4.0 * self.config.calibrate.samples * self._rows * width * self.workload.blocks
        return min(states, self.limits.spool_bytes)

    @property
    def _calibration(self) -> float:
        """What calibration holds. A block's moments are summed in float64, those of inputs and those of gradients one
        after the other; logits are made while no block runs."""
        logits = 4.0 * self.workload.outputs
        loss = max(TRIAL_SAMPLES * TRIAL_COPIES * logits, LOSS_COPIES * min(self._samples * logits, LOGITS))
        sums = 3 * max(self._input_moments, self._gradient_moments) / self.workload.blocks
        return self._converted + sums + self._layer / 2 + max(self._block_activations, loss) + self._states

    @property
    def _truncation(self) -> float:
        """What truncation holds: a block of both models with its factors, its moments, and work on one layer."""
        block, moments = 4.0 * self.workload.selected / self.workload.blocks, 2 * self._moments / self.workload.blocks
        passes = max(self._block_activations, TRIAL_SAMPLES * TRIAL_COPIES * 4.0 * self.workload.outputs)
        return self._converted + 2 * block + moments + self._layer + passes + self._states

    def _activations(self, samples: int) -> float:
        return 4.0 * samples * (LIVE_SHARE * self.workload.activations + LOSS_COPIES * self.workload.outputs)

    def _evaluation(self, samples: float) -> float:
        if self.limits.positions < USUAL_LIMITS.positions or self.config.task == "text-generation":
            samples = min(samples, max(1.0, self.limits.positions // self._rows))
        block_activations = self.workload.activations / self.workload.blocks
        return 4.0 * samples * (LIVE_SHARE * block_activations + LOSS_COPIES * self.workload.outputs)

    def need(self, stage: str) -> Need:
        """Return the peak memory of one stage."""
        held, mapped = self._needs(stage)
        if stage in BY_BLOCKS:
            kept = min(4.0 * self.workload.selected, MOST_KEPT)
            return Need(BLOCKWISE_LIBRARIES + kept + ALLOCATOR_OVERHEAD * held, mapped)
        extra = LIBRARIES + (BENCH_CEILINGS if stage == "bench" else 0)
        return Need(extra + ALLOCATOR_OVERHEAD * held, mapped)

    def _needs(self, stage: str) -> tuple[float, float]:
        config, batch = self.config, self.config.data.batch_size
        dense, small, moments = self._model, self._compressed_model, self._moments
        if stage == "calibrate":
            return self._calibration, self._stored
        if stage == "truncate":
            return self._truncation, self._stored + moments / self.workload.blocks
        evaluation = self._evaluation(batch)
        training = {
            "prehab": ((5 if config.prehab.train.distill else 4) * dense + moments, moments),
            "refine": (dense + 5 * small + moments, 0.0),
            "rehab": (dense + 5 * small + moments, 0.0),
        }
        schedules = {
            "prehab": config.prehab.train,
            "refine": config.refine.schedule,
            "rehab": config.rehab.train,
        }
        if stage in training:
            held, mapped = training[stage]
            peak = held + self._activations(schedules[stage].batch_size)
            return max(peak, dense + self._truncation) if stage == "prehab" else peak, mapped
        if stage == "baseline" and not self.dense_graph:
            return self._converted + evaluation, self._stored
        largest = dense if self.dense_graph else small
        held = {
            "merge": 2 * dense,
            "export": EXPORT_COPIES * small,
            "baseline": max(EXPORT_COPIES * dense, dense + evaluation),
            "verify": EXPORT_COPIES * largest + evaluation,
            "quantize": QUANTIZE_COPIES * largest + evaluation,
            "ort": 2 * largest,
            "bench": largest,
        }.get(stage, 0.0)
        return held, 0.0
