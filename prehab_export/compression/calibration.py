"""Second moments of what flows into and back out of each targeted layer, on a small sample.

Per layer: ``C = E[x xᵀ]`` and ``μ = E[x]`` over valid tokens, and, when asked for, ``G = E[Σ_t g_t g_tᵀ]`` where
``g_t = ∂ℓ/∂y_t`` is the gradient of *one unit's* loss ℓ (a sample of a classifier, a predicted token of a language
model) and the sum runs over its tokens. With these conventions ``½ tr(G Δ C Δᵀ)`` is the K-FAC-expand estimate
(arXiv 2311.00636) of the rise in mean loss, comparable across layers and tasks.

Which rows are valid tokens is not told by counting them: their numbers are followed through the model once
(`dataflow`), and where they do not stand in order, as in the experts of a mixture, in every batch.

The model may run in half precision; its activations and gradients are float32 before anything is made of them.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import inf, log2

import torch
from torch import Tensor, nn

from converters.errors import InputError
from converters.patterns import exclude_options
from converters.roots import weighs
from converters.selection import target_layers
from prehab_export.compression.activations import Place, by_sample, frozen, place_of
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.dataflow import TokenRows
from prehab_export.compression.moments import InputMoment, Statistics
from prehab_export.compression.token_rows import token_rows
from prehab_export.config import FISHER_LABELS
from prehab_export.inputs import Batch, Task, device_of, full_precision, moved, sample_count
from prehab_export.linalg import ClusterSums, PlainSums, real
from prehab_export.system import Progress, silent

# Where float16 calibration brings the largest gradients that a sample can have; float16 ends at 2^16, and what is
# smaller by 2^26 is still a normal number.
LARGEST_GRADIENT = 2.0**12

# (logits of the units, batch) → a label for each.
LabelsOf = Callable[[Tensor, Batch], Tensor]

Sums = ClusterSums | PlainSums

# Layer → the place of its rows at each of its runs in one pass.
Places = dict[str, list[Place]]


class CalibrationWarning(UserWarning):
    """The sample is too small for what was asked of it; the result is valid but could be better."""


@dataclass(frozen=True)
class Gather:
    """What to gather of a model.

    gradients: G too, at the cost of a backward pass a batch.
    labels: those behind the gradients: ``data`` takes the given ones (empirical Fisher), ``model`` draws them from the
        model's own output (true Fisher; needs no labels).
    sampling: how well the moments are known too, which shrinkage and the warning of a small sample go by.
    keep_on: where the moments lie; with the model by default.

    Raises (when made):
        InputError: labels are of another kind.
    """

    gradients: bool = True
    labels: str = "data"
    sampling: bool = True
    keep_on: torch.device | None = None

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

    The moments are float32: n² numbers an input and, with gradients, m² a layer.

    Args:
        batches: as the task makes them; padding is left out by the task's token mask.
        layers: those to compress, by name; by default what `target_layers` takes of the model.
        gather: what to gather; everything by default.

    Raises:
        InputError: no batch at all, a layer that no batch reaches, one that keeps no gradients, or NaN/Inf in a
            moment (naming the layer).
    """
    gather = gather or Gather()
    layers = target_layers(model) if layers is None else layers
    device = device_of(model)
    iterator = (moved(batch, device) for batch in batches)
    first = next(iterator, None)
    if first is None:
        raise InputError("the calibration sample is empty; give a split with rows in it")
    groups, places = _look_around(model, task, first, layers)
    generator = torch.Generator().manual_seed(seed)

    def labels_of(unit_logits: Tensor, batch: Batch) -> Tensor:
        return task.unit_labels(batch) if gather.labels == "data" else _sampled(unit_logits, generator)

    steps = len(batches) if isinstance(batches, Sized) else 0
    with frozen(model), torch.set_grad_enabled(gather.gradients), progress("calibrate", steps) as advance:
        scaled = gather.gradients and task.precision == "float16"
        scale = _loss_scale(model, task, first, layers) if scaled else 1.0
        sums = partial(ClusterSums if gather.sampling else PlainSums, gather.keep_on)
        tally = _Tally(groups, places, sums, scale)
        for batch in _chain(first, iterator):
            tally.watch(model, task, batch, layers, labels_of if gather.gradients else None)
            advance()
    statistics = replace(tally.result(), labels=gather.labels)
    statistics.check_finite()
    for message in doubts(statistics):
        warnings.warn(message, CalibrationWarning, stacklevel=2)
    return Calibrated(model, task, statistics)


def doubts(statistics: Statistics) -> list[str]:
    """What to tell the user of moments that are right but could say more: sentences."""
    found = [few_tokens(statistics)]
    gradients = statistics.gradients
    silent = [name for name in statistics.groups if name in gradients and not weighs(gradients[name])]
    if silent and len(silent) == len(gradients):
        found.append(
            "no layer has a part in the loss on this sample (is the head all zeros?): layers are cut as by "
            "`--objective activation --allocation uniform`"
        )
    elif silent:
        found.append(f"{_and_more(silent)} no part in the loss on this sample, so it counts for nothing what they lose")
    still = [group for group, moment in statistics.inputs.items() if not weighs(moment.centred())]
    if still:
        found.append(f"{_and_more(still)} the same input for every token of this sample")
    return [message for message in found if message is not None]


def _and_more(names: Sequence[str]) -> str:
    return f"{names[0]} has" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more have"


def few_tokens(statistics: Statistics) -> str | None:
    """What to tell the user when a layer has more inputs than calibration is worth independent tokens; else None."""
    known = {group: moment.sampling.effective_tokens for group, moment in statistics.inputs.items()}
    short = {
        group: effective
        for group, effective in known.items()
        if effective is not None and effective < statistics.inputs[group].mean.numel()
    }
    if not short:
        return None
    # The widest gap first.
    group, effective = min(short.items(), key=lambda item: item[1] / statistics.inputs[item[0]].mean.numel())
    moment = statistics.inputs[group]
    return (
        f"calibration ({moment.sampling.samples} samples, {moment.tokens} tokens) is worth "
        f"{effective:.0f} independent tokens for the {moment.mean.numel()} inputs of {group}"
        + (f" (and too few for {len(short) - 1} more)" if len(short) > 1 else "")
        + "; the result is valid, give more samples for a better one"
    )


def shared_inputs(model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layer → input group, by watching which layers are handed the very same tensor.

    Raises:
        InputError: a layer is not reached by the model's forward pass.
    """
    return _look_around(model, task, batch, layers)[0]


def _look_around(
    model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module]
) -> tuple[dict[str, str], Places]:
    """`shared_inputs`, and the place of each layer's rows at each of its runs. Two samples tell; experts that these do
    not reach are looked for with the whole batch."""
    try:
        return _look(model, task, {key: value[[0, -1]] for key, value in batch.items()}, layers)
    except InputError:
        return _look(model, task, batch, layers)


def _look(model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module]) -> tuple[dict[str, str], Places]:
    seen: dict[str, list[tuple]] = {name: [] for name in layers}
    places: Places = {name: [] for name in layers}
    alive: list[Tensor] = []  # holds inputs until the pass ends, or an address could be used twice
    batch = moved(batch, device_of(model))
    mask = task.token_mask(batch)
    rows = None if mask is None else token_rows(batch, mask)

    def watch(name: str) -> Callable:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            alive.append(x)
            seen[name].append((x.data_ptr(), x.shape, x.stride(), x._version))
            places[name].append(place_of(x, rows))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with frozen(model), torch.no_grad(), rows or nullcontext():
            task.logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    unreached = [name for name, keys in seen.items() if not keys]
    if unreached:
        raise InputError(f"the model never runs {_left_out(unreached, seen)}")
    leaders: dict[tuple, str] = {}
    return {name: leaders.setdefault(tuple(keys), name) for name, keys in seen.items()}, places


def _left_out(names: Sequence[str], layers: Iterable[str]) -> str:
    """The first of these layers, how many more there are, and how to leave them all out and none of the others."""
    more = f" and {len(names) - 1} more layer{'s' if len(names) > 2 else ''}" if len(names) > 1 else ""
    them = "them" if more else "it"
    options = exclude_options(names, [name for name in layers if name not in names])
    return f"{names[0]}{more} on this data; leave {them} out with {options}"


class _Tally:
    """Running sums of outer products, sample by sample, gathered by hooks.

    places: of each layer's rows, at each of its runs in a pass.
    sums: makes the sums of one layer.
    loss_scale: a power of two that the loss is multiplied by before its backward pass; gradients are divided by it.
    """

    def __init__(
        self, groups: Mapping[str, str], places: Places, sums: Callable[[], Sums], loss_scale: float = 1.0
    ) -> None:
        self.groups = groups
        self.places = places
        self.follows = any(Place.FOLLOWED in runs for runs in places.values())
        self.sums = sums
        self.loss_scale = loss_scale
        self.units = 0
        # Inputs are summed relative to the mean of the first batch: massive means then cancel before they are
        # squared, and the sampling error is that of the centred moment.
        self.shift: dict[str, Tensor] = {}
        self.total: dict[str, Tensor] = {}
        self.inputs = {group: sums() for group in groups.values()}
        self.gradients: dict[str, Sums] = {}

    def watch(
        self, model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module], labels_of: LabelsOf | None
    ) -> None:
        """One batch: a forward pass, and a backward pass from the loss of ``labels_of`` if that is given."""
        mask = task.token_mask(batch)
        rows = token_rows(batch, mask) if self.follows and mask is not None else None
        with self._listening(task, batch, layers, labels_of is not None, rows):
            with rows or nullcontext():
                logits = task.logits(model, batch)
            unit_logits = task.unit_logits(logits, batch)
            if labels_of is not None:
                targets = labels_of(unit_logits, batch)
                # The sum, not the mean: every unit keeps the gradient of its own loss.
                loss = nn.functional.cross_entropy(unit_logits.float(), targets, reduction="sum")
                (self.loss_scale * loss).backward()
        self.units += unit_logits.shape[0]

    @contextmanager
    def _listening(
        self, task: Task, batch: Batch, layers: Mapping[str, nn.Module], gradients: bool, rows: TokenRows | None
    ) -> Iterator[None]:
        mask, samples = task.token_mask(batch), sample_count(batch)
        units = _units_by_sample(task, batch) if gradients else None
        handles = []
        for name, layer in layers.items():
            if self.groups[name] == name:
                handles.append(layer.register_forward_pre_hook(self._input_hook(name, mask, samples, rows)))
            if units is not None:
                handles.append(layer.register_forward_hook(self._output_hook(name, mask, units, rows)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _where(self, name: str, rows: TokenRows | None) -> Callable[[Tensor], tuple[Place, Tensor | None]]:
        """(the layer's input) → its place and the numbers of its rows, called at each of its runs in one pass."""
        known = iter(self.places[name])

        def where(x: Tensor) -> tuple[Place, Tensor | None]:
            # How often an expert is run depends on the batch.
            place = next(known, Place.UNKNOWN)
            if rows is not None and place in (Place.FOLLOWED, Place.UNKNOWN):
                place = place_of(x, rows)
            return place, None if rows is None or place is not Place.FOLLOWED else rows.rows(x)

        return where

    def _input_hook(self, name: str, mask: Tensor | None, samples: int, rows: TokenRows | None) -> Callable:
        where = self._where(name, rows)

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            place, numbers = where(args[0])
            with full_precision(x.device):
                values, valid = by_sample(x, mask, samples, place, numbers)
                if not bool(valid.any()):
                    return
                if name not in self.shift:
                    self.shift[name] = real(values, valid).mean(0)
                    self.total[name] = torch.zeros_like(self.shift[name])
                values = values - self.shift[name]
                self.total[name] += real(values, valid).sum(0)
                self.inputs[name].add(values, valid, valid.sum(1))

        return hook

    def _output_hook(self, name: str, mask: Tensor | None, units: Tensor, rows: TokenRows | None) -> Callable:
        where = self._where(name, rows)

        def on_gradient(gradient: Tensor, place: Place, numbers: Tensor | None) -> None:
            with full_precision(gradient.device):
                values, valid = by_sample(gradient, mask, len(units), place, numbers)
                sizes = units if len(values) == len(units) else units.sum()[None]
                values = values if self.loss_scale == 1 else values / self.loss_scale
                if name not in self.gradients:
                    self.gradients[name] = self.sums()
                self.gradients[name].add(values, valid, sizes.to(values.device))

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise InputError(
                    f"the model runs {name} without keeping what gradients need (reversible layers do), so that no "
                    "rise of the loss can be told; use --objective activation --allocation uniform"
                )
            place, numbers = where(args[0])
            return _gradient_hook(lambda gradient: on_gradient(gradient, place, numbers))(module, args, output)

        return hook

    def _input_moment(self, group: str) -> InputMoment:
        sums = self.inputs[group]
        shift, offset = (values.to(sums.outer.device) for values in (self.shift[group], self.total[group] / sums.rows))
        # offset shiftᵀ + shift offsetᵀ + shift shiftᵀ, as two updates in place
        second = sums.outer / sums.rows
        second.addr_(offset + shift, shift).addr_(shift, offset)
        return InputMoment(second, shift + offset, sums.rows, sums.sampling())

    def result(self) -> Statistics:
        empty = [group for group, sums in self.inputs.items() if not sums.rows]
        if empty:
            raise InputError(f"no token of this data comes to {empty[0]}; leave it out with --exclude {empty[0]!r}")
        silent = [name for name in self.groups if self.gradients and name not in self.gradients]
        if silent:
            raise InputError(f"the loss does not depend on {_left_out(silent, self.groups)}")
        return Statistics(
            {group: self._input_moment(group) for group in self.inputs},
            dict(self.groups),
            {name: sums.outer / self.units for name, sums in self.gradients.items()},
            self.units,
            {name: sums.sampling() for name, sums in self.gradients.items()},
        )


def _gradient_hook(action: Callable[[Tensor], None]) -> Callable:
    """A forward hook that has ``action`` called with the gradient of the module's output."""

    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # With every parameter frozen, the graph starts at the first targeted layers. The clone keeps a model
        # that works in place from touching the leaf.
        tracked = output if output.requires_grad else output.requires_grad_().clone()
        tracked.register_hook(action)
        return tracked

    return hook


def _units_by_sample(task: Task, batch: Batch) -> Tensor:
    """How many units of the loss each sample holds (B)."""
    rows = ({key: value[at : at + 1] for key, value in batch.items()} for at in range(sample_count(batch)))
    return torch.tensor([len(task.unit_labels(row)) for row in rows])


def _loss_scale(model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module]) -> float:
    """A power of two that brings the largest gradients to about ``LARGEST_GRADIENT``: those of the worst mistakes, so
    that no batch has much larger ones."""
    sizes: list[Tensor] = []
    hook = _gradient_hook(lambda gradient: sizes.append(gradient.abs().amax().float()))
    handles = [layer.register_forward_hook(hook) for layer in layers.values()]
    try:
        unit_logits = task.unit_logits(task.logits(model, batch), batch).float()
        nn.functional.cross_entropy(unit_logits, unit_logits.argmin(-1), reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
    largest = max(1.0, *map(float, sizes))  # at the logits themselves it is 1
    # What overflows even unscaled is refused with the moments.
    return 2.0 ** round(log2(LARGEST_GRADIENT / largest)) if largest < inf else 1.0


def _sampled(unit_logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label a unit, drawn from the model's own distribution."""
    probabilities = unit_logits.detach().float().softmax(-1)
    return torch.multinomial(probabilities.cpu(), 1, generator=generator).squeeze(1).to(unit_logits.device)


def _chain(first: Batch, rest: Iterator[Batch]) -> Iterator[Batch]:
    yield first
    yield from rest
