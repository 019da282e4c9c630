"""Computes factors for a dense model from its moments: everything that happens before training.

The steps are: choose objectives by measurement if requested (``objective_choice``), compute ranks and factors in closed
form (``truncation``), and fit the factors again at the same ranks to the inputs that the compressed model produces
(``drift``), with block-wise refinement if requested (``refinement``).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from prehab_export.compression.block_walk import BlockWalk
from prehab_export.compression.blocks import Block, NotAChain
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.decompositions import Decompositions, decompose_layers
from prehab_export.compression.drift import truncate_along
from prehab_export.compression.objective_choice import KindTrial, choose_objectives
from prehab_export.compression.planning import RankPlan
from prehab_export.compression.spool import Folders
from prehab_export.compression.truncation import Truncation, plan_truncation, truncate
from prehab_export.config import TruncateConfig
from prehab_export.inputs import Samples
from prehab_export.system import Progress, silent


@dataclass(frozen=True)
class Samplesets:
    """Samples for `compress`, and folders for what does not fit in memory.

    calibration: the samples that the moments were gathered from.
    held_out: samples that calibration did not see; they decide between alternatives.
    """

    calibration: Samples
    held_out: Samples
    batch_size: int = 32
    folders: Folders = field(default_factory=Folders)


@dataclass(frozen=True)
class Compression:
    """The result of `compress`: the truncation, the measured trials of objectives, and warnings for the user."""

    truncation: Truncation
    trials: list[KindTrial] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return the entries for the report."""
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
    """Compute factors for every layer to compress; the dense model does not change.

    Args:
        decomposed: decompositions of these weights and moments, if they exist already.
        plan: ranks to use instead of those that the allocation would choose.
        after_block: called when a block has its factors, to tune them (see `block_refiner`).

    Raises:
        InputError: gradient moments are needed but missing, or every layer would stay dense.
    """
    trials: list[KindTrial] = []
    if decomposed is None and config.objective == "auto":
        decomposed, trials = choose_objectives(
            calibrated, samples.held_out, config, batch_size=samples.batch_size, progress=progress
        )
    if not config.corrects_drift:
        decomposed = decomposed or decompose_layers(calibrated, config, keep=samples.folders, progress=progress)
        return Compression(truncate(calibrated, config, decomposed=decomposed, plan=plan), trials)
    decomposed = decomposed or decompose_layers(calibrated, config, progress=progress)
    planned = plan_truncation(calibrated, config, decomposed, plan)
    try:
        corrected = truncate_along(
            calibrated,
            samples.calibration.batches(samples.batch_size),
            planned,
            gradient_shrinkage=config.gradient_shrinkage,
            after_block=after_block,
            folders=samples.folders,
            progress=progress,
        )
    except NotAChain as reason:
        truncation = truncate(calibrated, config, decomposed=decomposed, plan=plan)
        return Compression(truncation, trials, [f"drift is not corrected: {reason}"])
    return Compression(corrected, trials, list(corrected.notes))
