"""The most memory that each stage of a run holds beside what this process holds already, before it is done."""

from dataclasses import dataclass

from prehab_export.config import RunConfig
from prehab_export.pipeline.workload import Workload

# What the estimate leaves out, for who reads it.
ASSUMPTION = (
    "models and moments in float32, the activations of a batch, and float64 work on the largest layer; libraries and "
    "data as they are held now"
)
# The share of what operations give that is held at a time, for the way back too.
HELD = 0.35
# Copies of a batch's output while its loss is worked out and taken back.
LOSS = 4
# Bytes of libraries that are loaded on the way, and of what the bench measures the machine with.
LIBRARIES, CEILINGS = 250e6, 450e6
# What freed memory the allocator keeps: so much more is held than is in use.
KEPT = 1.25
# Copies of a model's weights while it is exported: the model, the graph, the graph as it is written, and a session.
EXPORTED = 4


@dataclass(frozen=True)
class Memory:
    """Bytes by stage.

    kept: the share of the selected layers' parameters that the compressed model keeps.
    """

    config: RunConfig
    load: Workload
    kept: float

    @property
    def _model(self) -> float:
        return 4.0 * self.load.parameters

    @property
    def _compressed(self) -> float:
        return 4.0 * (self.load.parameters - (1 - self.kept) * self.load.selected)

    @property
    def _moments(self) -> float:
        inputs = sum(group[0].n ** 2 for group in self.load.inputs.values())
        gradients = sum(layer.m**2 for layer in self.load.layers) if self.config.needs_gradients else 0
        return 4.0 * (inputs + gradients)

    @property
    def _layer(self) -> float:
        """Matrices in float64 while the largest layer is decomposed."""
        return max((8.0 * 4 * max(layer.m, layer.n) ** 2 for layer in self.load.layers), default=0.0)

    def _activations(self, samples: int) -> float:
        return 4.0 * samples * (HELD * self.load.activations + LOSS * self.load.answers)

    def _judged(self, samples: int) -> float:
        return 4.0 * samples * (HELD * self.load.activations / self.load.blocks + LOSS * self.load.answers)

    @property
    def _compress(self) -> float:
        """Beside the dense model and its moments: the student, decompositions, and the states of the sample."""
        low = sum(min(layer.m, layer.n) * (layer.m + layer.n) / 2 for layer in self.load.layers)
        width = max((layer.n for layer in self.load.layers), default=0)
        rows = max((layer.rows for layer in self.load.layers), default=0.0)
        states = 8.0 * self.config.calibrate.samples * rows * width / 2
        return self._model + 4.0 * low + states + self._layer + self._activations(self.config.data.batch_size) / 4

    def of(self, stage: str) -> float:
        """Bytes that one stage holds at most."""
        return LIBRARIES + KEPT * self._used(stage) + (CEILINGS if stage == "bench" else 0)

    def _used(self, stage: str) -> float:
        config, batch = self.config, self.config.data.batch_size
        dense, small, moments = self._model, self._compressed, self._moments
        judged = self._judged(batch)
        trained = {
            "prehab": (5 if config.prehab.train.distill else 4) * dense + 2 * moments,
            "refine": dense + 5 * small + moments,
            "rehab": dense + 5 * small + moments,
        }
        schedules = {
            "prehab": config.prehab.train,
            "refine": config.refine.schedule,
            "rehab": config.rehab.train,
        }
        if stage in trained:
            work = trained[stage] + self._activations(schedules[stage].batch_size)
            return max(work, dense + moments + self._compress) if stage == "prehab" else work
        return {
            "merge": 2 * dense,
            "calibrate": dense + moments + self._layer + self._activations(batch),
            "truncate": dense + moments + self._compress,
            "export": EXPORTED * small,
            "baseline": max(EXPORTED * dense, dense + judged),
            "verify": 3 * dense + judged,
            "quantize": EXPORTED * dense + judged,
            "ort": 2 * dense,
            "bench": dense,
        }.get(stage, 0.0)
