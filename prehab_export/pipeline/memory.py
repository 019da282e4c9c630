"""Estimates of the peak memory of each stage of a run, on top of what this process already holds."""

from dataclasses import dataclass

from prehab_export.compression import SPOOL_LIMIT
from prehab_export.config import RunConfig
from prehab_export.inputs import MICRO_BATCH_POSITIONS
from prehab_export.pipeline.workload import Workload

# The assumptions of the estimate, which the forecast quotes.
ASSUMPTION = (
    "models in float32, the moments and activations of one block, and float64 work on the largest layer; libraries and "
    "data as they are in memory now"
)
# The share of all activations that is in memory at once, including those kept for the backward pass.
LIVE_SHARE = 0.35
# Copies of a batch's output during the forward and backward passes of its loss.
LOSS_COPIES = 4
# Bytes of libraries loaded later, and of the buffers with which the bench measures the machine's ceilings.
LIBRARIES, BENCH_CEILINGS = 250e6, 450e6
# Resident memory over memory in use: the allocator keeps some freed memory.
ALLOCATOR_OVERHEAD = 1.25
# Copies of a model's weights during export: the model, the graph, the serialised graph, and a session.
EXPORT_COPIES = 4


@dataclass(frozen=True)
class Memory:
    """The peak memory of each stage of a run, in bytes.

    kept_share: the share of the selected layers' parameters that remains in the compressed model.
    """

    config: RunConfig
    workload: Workload
    kept_share: float

    @property
    def _model(self) -> float:
        return 4.0 * self.workload.parameters

    @property
    def _compressed_model(self) -> float:
        return 4.0 * (self.workload.parameters - (1 - self.kept_share) * self.workload.selected)

    @property
    def _moments(self) -> float:
        inputs = sum(group[0].n ** 2 for group in self.workload.inputs.values())
        gradients = sum(layer.m**2 for layer in self.workload.layers) if self.config.needs_gradients else 0
        return 4.0 * (inputs + gradients)

    @property
    def _layer(self) -> float:
        """Float64 matrices while the largest layer is decomposed."""
        return max((8.0 * 4 * max(layer.m, layer.n) ** 2 for layer in self.workload.layers), default=0.0)

    @property
    def _blockwise(self) -> float:
        """What calibration and truncation hold of the block that they work on, and of the hidden states of all."""
        blocks, rows = self.workload.blocks, max((layer.rows for layer in self.workload.layers), default=1.0)
        samples = min(self.config.data.batch_size, max(1.0, MICRO_BATCH_POSITIONS / rows))
        activations = 4.0 * samples * (self.workload.activations / blocks + LOSS_COPIES * self.workload.outputs)
        width = max((layer.n for layer in self.workload.layers), default=0)
        states = 4.0 * self.config.calibrate.samples * rows * width * blocks
        # While they are summed, moments are float64.
        return 2 * self._moments / blocks + activations + min(states, SPOOL_LIMIT) + self._layer

    def _activations(self, samples: int) -> float:
        return 4.0 * samples * (LIVE_SHARE * self.workload.activations + LOSS_COPIES * self.workload.outputs)

    def _evaluation(self, samples: int) -> float:
        block_activations = self.workload.activations / self.workload.blocks
        return 4.0 * samples * (LIVE_SHARE * block_activations + LOSS_COPIES * self.workload.outputs)

    @property
    def _compression(self) -> float:
        """The decompositions, the factors and the block in work; not the dense model."""
        low = sum(min(layer.m, layer.n) * (layer.m + layer.n) / 2 for layer in self.workload.layers)
        return 4.0 * low + self._compressed_model + self._blockwise

    def stage_bytes(self, stage: str) -> float:
        """Return the peak bytes of one stage."""
        return LIBRARIES + ALLOCATOR_OVERHEAD * self._live_bytes(stage) + (BENCH_CEILINGS if stage == "bench" else 0)

    def _live_bytes(self, stage: str) -> float:
        config, batch = self.config, self.config.data.batch_size
        dense, small, moments = self._model, self._compressed_model, self._moments
        evaluation = self._evaluation(batch)
        training = {
            "prehab": (5 if config.prehab.train.distill else 4) * dense + 2 * moments,
            "refine": dense + 5 * small + moments,
            "rehab": dense + 5 * small + moments,
        }
        schedules = {
            "prehab": config.prehab.train,
            "refine": config.refine.schedule,
            "rehab": config.rehab.train,
        }
        if stage in training:
            peak = training[stage] + self._activations(schedules[stage].batch_size)
            return max(peak, dense + moments + self._compression) if stage == "prehab" else peak
        return {
            "merge": 2 * dense,
            "calibrate": dense + self._blockwise,
            "truncate": dense + self._compression,
            "export": EXPORT_COPIES * small,
            "baseline": max(EXPORT_COPIES * dense, dense + evaluation),
            "verify": 3 * dense + evaluation,
            "quantize": EXPORT_COPIES * dense + evaluation,
            "ort": 2 * dense,
            "bench": dense,
        }.get(stage, 0.0)
