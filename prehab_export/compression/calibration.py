"""Gathers second moments of the inputs and output gradients of each selected layer, on a small sample.

For each layer these are ``C = E[x xᵀ]`` and ``μ = E[x]`` over valid tokens and, if requested, ``G = E[Σ_t g_t g_tᵀ]``.
Here ``g_t = ∂ℓ/∂y_t`` is the gradient of *one unit's* loss ℓ (a sample of a classifier, a predicted token of a language
model), and the sum runs over its tokens. With these conventions ``½ tr(G Δ C Δᵀ)`` is the K-FAC-expand estimate
(arXiv 2311.00636) of the increase in mean loss, comparable across layers and tasks.

Counting rows does not show which of them are valid tokens. Their numbers are therefore tracked through the model
(`dataflow`): once if the rows are in order, in every batch if they are not, as in the experts of a mixture.

The model may run in half precision; its activations and gradients are converted to float32 before they are used.
"""

import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from math import inf, log2
from pathlib import Path

import torch
from torch import Tensor, nn

from converters.errors import InputError
from converters.selection import select_layers
from prehab_export.compression.activations import frozen
from prehab_export.compression.blocks import NotAChain
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.calibration_by_blocks import BlockCalibration
from prehab_export.compression.chain import Chain
from prehab_export.compression.checkpoints import Checkpoints
from prehab_export.compression.doubts_of_moments import doubts
from prehab_export.compression.input_groups import exclusion, trace_inputs
from prehab_export.compression.moment_files import MomentWriter
from prehab_export.compression.moments import Statistics
from prehab_export.compression.spool import USUAL_LIMITS, MemoryLimits, Spool
from prehab_export.compression.tally import Labels, Tally, gradient_hook, units_by_sample
from prehab_export.config import FISHER_LABELS, CalibrateConfig
from prehab_export.inputs import Batch, Task, device_of, micro_batches, moved
from prehab_export.linalg import ClusterSums, PlainSums
from prehab_export.system import Progress, silent, team

# In float16 the loss is scaled so that the largest gradients of a sample come to about this size. float16 ends at 2^16,
# and values smaller than this by 2^26 are still normal numbers.
LARGEST_GRADIENT = 2.0**12


class CalibrationWarning(UserWarning):
    """The calibration sample is too small or too uniform; the result is valid but could be better."""


@dataclass(frozen=True)
class Gather:
    """What to gather from a model.

    gradients: also gather G, at the cost of one backward pass per batch.
    labels: labels for the gradients: ``data`` uses those of the data (empirical Fisher), ``model`` draws them from the
        model's own output (true Fisher; needs no labels).
    sampling: also estimate the sampling error of the moments, which shrinkage and the small-sample warning need.
    gradient_units: units whose loss is differentiated: those of the first samples, until they are at least as many.
        Gradients take two thirds of the time.
    keep_on: device for the moments; by default the model's device.
    scratch: folder for temporary files, which hold states that do not fit in memory; by default the system's.
    limits: what is held in memory at once.
    save_to: folder to write the moments to, part by part; the result then reads them from there. If a process that did
        the same work on the same samples was killed, its folder is completed. By default moments stay in memory.

    Raises (when created):
        InputError: ``labels`` has another value.
    """

    gradients: bool = True
    labels: str = "data"
    sampling: bool = True
    gradient_units: int = CalibrateConfig.gradient_units
    keep_on: torch.device | None = None
    scratch: Path | None = None
    limits: MemoryLimits = USUAL_LIMITS
    save_to: Path | None = None

    def __post_init__(self) -> None:
        if self.labels not in FISHER_LABELS:
            raise InputError(f"Fisher labels must be one of {', '.join(FISHER_LABELS)}, not {self.labels!r}")


def calibrate(
    model: nn.Module,
    task: Task,
    batches: Iterable[Batch],
    layers: Mapping[str, nn.Module] | None = None,
    *,
    gather: Gather | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Calibrated:
    """Run the batches through the model and gather moments of every layer to compress.

    The moments are float32: n² numbers per input and, with gradients, m² per layer. Processes that work together
    take a share of the batches each, and all return the same moments.

    Args:
        batches: batches for the task; the task's token mask excludes padding.
        layers: the layers to compress, by name; by default those that `select_layers` selects.
        gather: what to gather; by default everything.

    Raises:
        InputError: there is no batch, no batch reaches a layer, a layer keeps no gradients, or a moment holds NaN/Inf
            (the message names the layer).
    """
    gather = gather or Gather()
    layers = select_layers(model) if layers is None else layers
    device = device_of(model)
    differentiated, others = _split_at(batches, task, gather.gradient_units if gather.gradients else 0)
    parts = list(micro_batches([*differentiated, *others], gather.limits.positions))
    if not parts:
        raise InputError("the calibration sample is empty; give a split with rows in it")
    first = moved(parts[0], device)
    share = {number: moved(parts[number], device) for number in team().share_of(len(parts))}
    groups, orders = trace_inputs(model, task, first, layers)
    seeds = torch.randint(2**31, (len(parts),), generator=torch.Generator().manual_seed(seed)).tolist()

    def labels_of_batch(number: int) -> Labels:
        if gather.labels == "data":
            return lambda _, batch: task.unit_labels(batch)
        generator = torch.Generator().manual_seed(seeds[number])
        return lambda unit_logits, _: _sample_labels(unit_logits, generator)

    count = sum(1 for _ in micro_batches(differentiated, gather.limits.positions))
    labels_of = {number: labels_of_batch(number) for number in share if number < count}

    with frozen(model), torch.set_grad_enabled(gather.gradients):
        scaled = gather.gradients and task.precision == "float16"
        scale = team().from_first(_loss_scale(model, task, first, layers) if scaled else 1.0)

        def tally_of(names: Iterable[str], *, inputs: bool = True) -> Tally:
            sums, names = partial(ClusterSums if gather.sampling else PlainSums, gather.keep_on), list(names)
            orders_of = {name: orders[name] for name in names}
            return Tally({name: groups[name] for name in names}, orders_of, sums, scale, inputs=inputs)

        checkpoints = None if gather.save_to is None else Checkpoints(gather.save_to, parts)
        chain = _chain(model, task, first, layers)
        if chain is None:
            moments = _whole_passes(model, task, share, layers, tally_of(layers), labels_of, progress)
        else:
            spool = Spool(gather.limits.spool_bytes, gather.scratch)
            moments = BlockCalibration(
                chain, share, layers, tally_of, labels_of, gather.gradients, spool, checkpoints
            ).parts(progress)
        with closing(moments):  # if it is left in the midst, it must not turn gradients off or on later
            statistics = _collected(moments, list(layers), gather, checkpoints)
    silent = [name for name in layers if name not in statistics.gradients]
    if gather.gradients and silent:
        raise InputError(f"the loss does not depend on {exclusion(silent, groups)}")
    for message in doubts(statistics):
        warnings.warn(message, CalibrationWarning, stacklevel=2)
    return Calibrated(model, task, statistics)


def _split_at(batches: Iterable[Batch], task: Task, units: int) -> tuple[list[Batch], list[Batch]]:
    """Return the first samples of the batches, until they have this many units, and the others."""
    first: list[Batch] = []
    others: list[Batch] = []
    for batch in batches:
        if units <= 0:
            others.append(batch)
            continue
        ends = units_by_sample(task, batch).cumsum(0)
        count = min(len(ends), int((ends < units).sum()) + 1)
        first.append({name: value[:count] for name, value in batch.items()})
        units -= int(ends[count - 1])
        if count < len(ends):
            others.append({name: value[count:] for name, value in batch.items()})
    return first, others


def _whole_passes(
    model: nn.Module,
    task: Task,
    batches: Mapping[int, Batch],
    layers: Mapping[str, nn.Module],
    tally: Tally,
    labels_of: Mapping[int, Labels],
    progress: Progress,
) -> Generator[Statistics, None, None]:
    """Run the whole model forward and backward on each batch, and yield the moments of all layers."""

    def watch_first(trial: Tally) -> None:
        for batch in batches.values():
            if not trial.has_shift:
                trial.watch(model, task, batch, layers, None)

    tally.set_shift(team(), watch_first)
    with progress("calibrate", len(batches)) as advance:
        for number, batch in batches.items():
            tally.watch(model, task, batch, layers, labels_of.get(number))
            advance()
    tally.pool(team(), device_of(model))
    yield tally.result()


def _collected(
    parts: Iterable[Statistics], layers: Sequence[str], gather: Gather, checkpoints: Checkpoints | None
) -> Statistics:
    """Check the moments of the parts of a model, write them if requested, and return them as one.

    Raises:
        InputError: a moment holds NaN or Inf. The message names the first input of which that is true, or else the
            last gradient, since they spread forward and backward.
    """
    writer = None if gather.save_to is None else MomentWriter(gather.save_to)
    held: list[Statistics] = []
    if writer is not None and checkpoints is not None and checkpoints.found is not None:
        held = writer.keep(checkpoints.found.parts)
    overflows: dict[str, list[str]] = {"input": [], "output gradient": []}

    def note_overflows(part: Statistics) -> None:
        for kind, layer in part.overflows():
            overflows[kind].append(layer)

    for part in held:
        note_overflows(part)
    for part in parts:
        note_overflows(part)
        held.append(writer.add(part) if writer is not None and part.groups else part)
    order = {layer: number for number, layer in enumerate(layers)}
    for kind, choose in (("input", min), ("output gradient", max)):
        if overflows[kind]:
            raise InputError(
                f"the {kind} of {choose(overflows[kind], key=lambda layer: order[layer])} holds NaN or Inf on the "
                "calibration data; check the data and the model before compressing; float16 overflows where bfloat16 "
                "and float32 do not"
            )
    if writer is not None:
        writer.finish(layers, gather.labels)
    if checkpoints is not None:
        checkpoints.remove()
    return replace(Statistics.joined(held, layers), labels=gather.labels)


def _loss_scale(model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module]) -> float:
    """Return a power of two that scales the largest gradients to about `LARGEST_GRADIENT`.

    They are measured with the least likely label of every unit, so that no batch has much larger ones.
    """
    sizes: list[Tensor] = []
    hook = gradient_hook(lambda gradient: sizes.append(gradient.abs().amax().float()))
    handles = [layer.register_forward_hook(hook) for layer in layers.values()]
    try:
        unit_logits = task.unit_logits(task.logits(model, batch), batch).float()
        nn.functional.cross_entropy(unit_logits, unit_logits.argmin(-1), reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
    largest = max(1.0, *map(float, sizes))  # at the logits themselves the largest gradient is 1
    # A gradient that overflows even unscaled is refused when the moments are checked.
    return 2.0 ** round(log2(LARGEST_GRADIENT / largest)) if largest < inf else 1.0


def _sample_labels(unit_logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one label per unit from the model's own distribution."""
    probabilities = unit_logits.detach().float().softmax(-1)
    return torch.multinomial(probabilities.cpu(), 1, generator=generator).squeeze(1).to(unit_logits.device)


def _chain(model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module]) -> Chain | None:
    """Return the model as a chain that can be calibrated block by block; None if it has to be run as a whole."""
    try:
        chain = Chain.of(model, task, batch, layers)
    except NotAChain:
        return None
    return chain if chain.stubs is not None and not chain.before else None
