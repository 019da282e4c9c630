"""Chooses the objective for each kind of layer by measurement.

Two-sided whitening is the better metric on average, but it has been reported to hurt some kinds of layer (query and key
of some language models), and a gradient moment from a small sample may mislead. Therefore the truncated model is run
once with ``fisher`` everywhere, and once for every kind of layer with ``activation`` for that kind, at the same ranks,
on samples that calibration did not see. A kind switches to ``activation`` if this brings the model's output closer to
the dense model's by more than the error of the measurement. No labels are needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from converters.lowrank import DenseLinear
from prehab_export.compression.blocks import find_blocks
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.decompositions import Decompositions, decompose_layers, with_groups
from prehab_export.compression.planning import plan_ranks
from prehab_export.compression.spool import Folders, Spool
from prehab_export.compression.training import sharing_copy
from prehab_export.compression.truncation import truncate
from prehab_export.config import TruncateConfig
from prehab_export.inputs import Samples, divergences, torch_predictor
from prehab_export.system import Progress, named, silent, team

# A kind switches if it gains more than this many standard errors of the paired difference.
CONFIDENCE = 2.0


@dataclass(frozen=True)
class KindTrial:
    """The measurement of one kind of layer under ``activation`` instead of ``fisher``.

    layers: number of layers of this kind.
    change: mean change of the divergence from the dense model's output, in nats per sample (below 0 is better).
    standard_error: of ``change``.
    objective: the objective that was chosen.
    """

    kind: str
    layers: int
    change: float
    standard_error: float
    objective: str


def kinds_of(model: nn.Module, layers: Mapping[str, DenseLinear]) -> dict[str, list[str]]:
    """Group layers by their name inside a block (``attention.query``), which is the same in every block."""
    kinds: dict[str, list[str]] = {}
    inside = {name: block.name for block in find_blocks(model, layers) for name in block.layers}
    for name in layers:
        kind = name.removeprefix(inside[name] + ".") if name in inside else name
        kinds.setdefault(kind, []).append(name)
    return kinds


def choose_objectives(
    calibrated: Calibrated,
    samples: Samples,
    config: TruncateConfig,
    *,
    batch_size: int = 32,
    progress: Progress = silent,
) -> tuple[Decompositions, list[KindTrial]]:
    """Return decompositions of every layer under the objective chosen for its kind, and the measurements.

    Args:
        samples: samples to measure on, which calibration must not have seen.
    """
    model, task = calibrated.model, calibrated.task
    # Trials share no inputs: a group has one objective, but a trial changes only one kind at a time.
    unshared = replace(config, share_inputs=False)
    fisher, activation = (
        decompose_layers(
            calibrated,
            replace(unshared, objective=name),
            keep=Folders(),
            progress=named(progress, f"decompose for {name}"),
        )
        for name in ("fisher", "activation")
    )
    plan = plan_ranks(calibrated, fisher, config)
    reference = torch_predictor(model, task)

    def divergence_with(switched: Sequence[str]) -> Tensor:
        mixed = fisher.layers | {name: activation.layers[name] for name in switched}
        truncation = truncate(calibrated, config, decomposed=Decompositions(mixed), plan=plan)
        candidate = torch_predictor(truncation.apply(sharing_copy(model)), task)
        return divergences(candidate, reference, task, samples.batches(batch_size))

    base = divergence_with(())
    chosen, trials, kinds = dict(fisher.layers), [], kinds_of(model, calibrated.layers)
    with progress("choose objectives", len(kinds)) as advance:
        for kind, names in kinds.items():
            difference = divergence_with(names) - base
            change, error = float(difference.mean()), float(difference.std() / len(difference) ** 0.5)
            objective = team().from_first("activation" if change < -CONFIDENCE * error else "fisher")
            if objective == "activation":
                chosen |= {name: activation.layers[name] for name in names}
            trials.append(KindTrial(kind, len(names), change, error, objective))
            advance()
    return with_groups(calibrated, chosen, config, Spool()), trials
