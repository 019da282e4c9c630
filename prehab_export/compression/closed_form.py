"""From a dense model and its moments to the factors that replace it: all that happens before training.

Objectives by measurement where asked (``objective_choice``), ranks and factors in closed form (``truncation``), then
the same ranks again along the compressed model (``drift``), with block-wise refinement where asked (``refinement``).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from prehab_export.compression.block_walk import BlockWalk
from prehab_export.compression.blocks import Block, NotAChain
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.decompositions import Decompositions
from prehab_export.compression.drift import truncate_along
from prehab_export.compression.objective_choice import KindTrial, choose_objectives
from prehab_export.compression.planning import RankPlan
from prehab_export.compression.truncation import Truncation, truncate
from prehab_export.config import TruncateConfig
from prehab_export.inputs import Samples
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
    calibrated: Calibrated,
    samples: Samplesets,
    config: TruncateConfig,
    *,
    decomposed: Decompositions | None = None,
    plan: RankPlan | None = None,
    after_block: Callable[[BlockWalk, Block], None] | None = None,
    progress: Progress = silent,
) -> Compression:
    """Factors for every layer to compress; the dense model is left as it is.

    Args:
        decomposed: decompositions of these very weights and moments, when at hand.
        plan: instead of what the allocation would choose.
        after_block: called when a block has its factors, to tune them (`block_refiner`).

    Raises:
        InputError: gradient moments are needed and missing, or every layer would stay dense.
    """
    trials: list[KindTrial] = []
    if decomposed is None and config.objective == "auto":
        decomposed, trials = choose_objectives(
            calibrated, samples.judging, config, batch_size=samples.batch_size, progress=progress
        )
    cut = truncate(calibrated, config, decomposed=decomposed, plan=plan, progress=progress)
    if not config.drift_correction or config.objective == "weight":  # plain SVD knows nothing of the inputs
        return Compression(cut, trials)
    try:
        along = truncate_along(
            calibrated,
            samples.calibration.batches(samples.batch_size),
            cut,
            gradient_shrinkage=config.gradient_shrinkage,
            after_block=after_block,
            progress=progress,
        )
    except NotAChain as reason:
        return Compression(cut, trials, [f"drift is not corrected: {reason}"])
    return Compression(along, trials, list(along.notes))
