"""From a dense model and its moments to the factors that replace it: all that happens before training.

Objectives by measurement where asked (``objective_choice``), ranks and factors in closed form (``truncation``), then
the same ranks again along the compressed model (``drift``), with block-wise refinement where asked (``refinement``).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from converters.lowrank import DenseLinear
from prehab_export.compression.blocks import NotAChain
from prehab_export.compression.decompositions import Decompositions, decompose_layers
from prehab_export.compression.drift import truncate_along
from prehab_export.compression.moments import Statistics
from prehab_export.compression.objective_choice import KindTrial, choose_objectives, kinds_of
from prehab_export.compression.planning import Plan
from prehab_export.compression.refinement import block_refiner
from prehab_export.compression.truncation import Truncation, truncate
from prehab_export.config import RefineConfig, TruncateConfig
from prehab_export.inputs import Samples, Task
from prehab_export.linalg import Cost, parameters
from prehab_export.system import Progress, silent


@dataclass(frozen=True)
class Samplesets:
    """calibration: what the moments came from. judging: samples that calibration did not see."""

    calibration: Samples
    judging: Samples
    batch_size: int = 32


@dataclass(frozen=True)
class Compression:
    """The truncation, what was measured on the way, and what the user should know."""

    truncation: Truncation
    trials: list[KindTrial] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        facts = {"objective_trials": [asdict(trial) for trial in self.trials], "warnings": self.warnings}
        return self.truncation.summary() | facts


def compress(
    model: nn.Module,
    task: Task,
    layers: Mapping[str, DenseLinear],
    statistics: Statistics,
    samples: Samplesets,
    config: TruncateConfig,
    refine: RefineConfig | None = None,
    *,
    decomposed: Decompositions | None = None,
    plan: Plan | None = None,
    cost: Cost = parameters,
    seed: int = 0,
    progress: Progress = silent,
) -> Compression:
    """Factors for every targeted layer of ``model``, which is left as it is.

    Args:
        refine: its block-wise part is done here.
        decomposed: decompositions of these very weights and moments, when at hand.
        plan: instead of what the allocation would choose.
        cost: what the budget is counted in (``rank_times.RankTimes.cost`` for a budget of latency).
        progress: makes the progress bar of each part.

    Raises:
        InputError: gradient moments are needed and missing, or every layer would stay dense.
    """
    trials: list[KindTrial] = []
    if decomposed is None and config.objective == "auto":
        with progress("choose objectives", len(kinds_of(model, layers))) as advance:
            decomposed, trials = choose_objectives(
                model,
                task,
                samples.judging,
                layers,
                statistics,
                config,
                cost=cost,
                batch_size=samples.batch_size,
                progress=advance,
            )
    if decomposed is None:
        with progress("decompose", len(layers)) as advance:
            decomposed = decompose_layers(layers, statistics, config, progress=advance)
    cut = truncate(layers, statistics, config, decomposed=decomposed, plan=plan, cost=cost)
    if not config.drift_correction or config.objective == "weight":  # plain SVD knows nothing of the inputs
        return Compression(cut, trials)
    refiner = None if refine is None or not refine.block_steps else block_refiner(refine, seed, statistics)
    try:
        with progress("truncate", len(layers)) as advance:
            along = truncate_along(
                model,
                samples.calibration.batches(samples.batch_size),
                task,
                layers,
                statistics,
                cut,
                config.gradient_shrinkage,
                after_block=refiner,
                progress=advance,
            )
    except NotAChain as reason:
        return Compression(cut, trials, [f"drift is not corrected: {reason}"])
    return Compression(along, trials, list(along.notes))
