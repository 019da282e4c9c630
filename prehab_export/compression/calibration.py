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
from converters.selection import select_layers
from prehab_export.compression.activations import RowOrder, by_sample, frozen, row_order
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.dataflow import TokenRows
from prehab_export.compression.moments import InputMoment, Statistics
from prehab_export.compression.token_rows import token_rows
from prehab_export.config import FISHER_LABELS
from prehab_export.inputs import Batch, Task, device_of, full_precision, moved, sample_count
from prehab_export.linalg import ClusterSums, PlainSums, real
from prehab_export.system import Progress, silent

# In float16 the loss is scaled so that the largest gradients of a sample come to about this size. float16 ends at 2^16,
# and values smaller than this by 2^26 are still normal numbers.
LARGEST_GRADIENT = 2.0**12

# (logits of the units, batch) → a label for each unit.
LabelsOf = Callable[[Tensor, Batch], Tensor]

Sums = ClusterSums | PlainSums

# Layer → the order of its rows in each of its runs in one forward pass.
RowOrders = dict[str, list[RowOrder]]


class CalibrationWarning(UserWarning):
    """The calibration sample is too small or too uniform; the result is valid but could be better."""


@dataclass(frozen=True)
class Gather:
    """What to gather from a model.

    gradients: also gather G, at the cost of one backward pass per batch.
    labels: labels for the gradients: ``data`` uses those of the data (empirical Fisher), ``model`` draws them from the
        model's own output (true Fisher; needs no labels).
    sampling: also estimate the sampling error of the moments, which shrinkage and the small-sample warning need.
    keep_on: device for the moments; by default the model's device.

    Raises (when created):
        InputError: ``labels`` has another value.
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

    The moments are float32: n² numbers per input and, with gradients, m² per layer.

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
    iterator = (moved(batch, device) for batch in batches)
    first = next(iterator, None)
    if first is None:
        raise InputError("the calibration sample is empty; give a split with rows in it")
    groups, orders = _trace_inputs(model, task, first, layers)
    generator = torch.Generator().manual_seed(seed)

    def labels_of(unit_logits: Tensor, batch: Batch) -> Tensor:
        return task.unit_labels(batch) if gather.labels == "data" else _sample_labels(unit_logits, generator)

    steps = len(batches) if isinstance(batches, Sized) else 0
    with frozen(model), torch.set_grad_enabled(gather.gradients), progress("calibrate", steps) as advance:
        scaled = gather.gradients and task.precision == "float16"
        scale = _loss_scale(model, task, first, layers) if scaled else 1.0
        sums = partial(ClusterSums if gather.sampling else PlainSums, gather.keep_on)
        tally = _Tally(groups, orders, sums, scale)
        for batch in _chain(first, iterator):
            tally.watch(model, task, batch, layers, labels_of if gather.gradients else None)
            advance()
    statistics = replace(tally.result(), labels=gather.labels)
    statistics.check_finite()
    for message in doubts(statistics):
        warnings.warn(message, CalibrationWarning, stacklevel=2)
    return Calibrated(model, task, statistics)


def doubts(statistics: Statistics) -> list[str]:
    """Return warnings, as sentences, about moments that are valid but could be better."""
    messages = [few_tokens(statistics)]
    gradients = statistics.gradients
    silent = [name for name in statistics.groups if name in gradients and not weighs(gradients[name])]
    if silent and len(silent) == len(gradients):
        messages.append(
            "no layer affects the loss on this sample (is the head all zeros?): layers are truncated as with "
            "`--objective activation --allocation uniform`"
        )
    elif silent:
        messages.append(f"{_have(silent)} no effect on the loss on this sample, so any error there counts as zero")
    constant = [group for group, moment in statistics.inputs.items() if not weighs(moment.centred())]
    if constant:
        messages.append(f"{_have(constant)} the same input for every token of this sample")
    return [message for message in messages if message is not None]


def _have(names: Sequence[str]) -> str:
    """Return the subject of a sentence about these layers, with its verb."""
    return f"{names[0]} has" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more have"


def few_tokens(statistics: Statistics) -> str | None:
    """Return a warning if a layer has more inputs than the sample is worth independent tokens, else None."""
    effective_tokens = {group: moment.sampling.effective_tokens for group, moment in statistics.inputs.items()}
    short = {
        group: effective
        for group, effective in effective_tokens.items()
        if effective is not None and effective < statistics.inputs[group].mean.numel()
    }
    if not short:
        return None
    # Report the widest gap.
    group, effective = min(short.items(), key=lambda item: item[1] / statistics.inputs[item[0]].mean.numel())
    moment = statistics.inputs[group]
    return (
        f"calibration ({moment.sampling.samples} samples, {moment.tokens} tokens) is worth "
        f"{effective:.0f} independent tokens for the {moment.mean.numel()} inputs of {group}"
        + (f" (and too few for {len(short) - 1} more)" if len(short) > 1 else "")
        + "; the result is valid, but more samples would give a better one"
    )


def shared_inputs(model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Map every layer to its input group, by observing which layers get the very same tensor.

    Raises:
        InputError: the model's forward pass does not reach a layer.
    """
    return _trace_inputs(model, task, batch, layers)[0]


def _trace_inputs(
    model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module]
) -> tuple[dict[str, str], RowOrders]:
    """Return the groups of `shared_inputs`, and the order of each layer's rows in each of its runs.

    Two samples are usually enough; the whole batch is used if they do not reach every expert.
    """
    try:
        return _trace_batch(model, task, {key: value[[0, -1]] for key, value in batch.items()}, layers)
    except InputError:
        return _trace_batch(model, task, batch, layers)


def _trace_batch(
    model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module]
) -> tuple[dict[str, str], RowOrders]:
    keys: dict[str, list[tuple]] = {name: [] for name in layers}
    orders: RowOrders = {name: [] for name in layers}
    alive: list[Tensor] = []  # keeps inputs alive until the pass ends, so that no address is used twice
    batch = moved(batch, device_of(model))
    mask = task.token_mask(batch)
    rows = None if mask is None else token_rows(batch, mask)

    def watch(name: str) -> Callable:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            alive.append(x)
            keys[name].append((x.data_ptr(), x.shape, x.stride(), x._version))
            orders[name].append(row_order(x, rows))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with frozen(model), torch.no_grad(), rows or nullcontext():
            task.logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    unreached = [name for name, runs in keys.items() if not runs]
    if unreached:
        raise InputError(f"the model never runs {_exclusion(unreached, keys)}")
    leaders: dict[tuple, str] = {}
    return {name: leaders.setdefault(tuple(runs), name) for name, runs in keys.items()}, orders


def _exclusion(names: Sequence[str], layers: Iterable[str]) -> str:
    """Name the first of these layers, the number of the others, and the options that exclude exactly these layers."""
    more = f" and {len(names) - 1} more layer{'s' if len(names) > 2 else ''}" if len(names) > 1 else ""
    pronoun = "them" if more else "it"
    options = exclude_options(names, [name for name in layers if name not in names])
    return f"{names[0]}{more} on this data; exclude {pronoun} with {options}"


class _Tally:
    """Running sums of outer products, gathered by hooks sample by sample.

    groups: layer → input group.
    orders: the order of each layer's rows in each of its runs in one forward pass.
    sums: creates empty sums for one layer.
    loss_scale: power of two by which the loss is multiplied before its backward pass; gradients are divided by it.
    """

    def __init__(
        self, groups: Mapping[str, str], orders: RowOrders, sums: Callable[[], Sums], loss_scale: float = 1.0
    ) -> None:
        self.groups = groups
        self.orders = orders
        self.tracks_rows = any(RowOrder.TRACKED in runs for runs in orders.values())
        self.sums = sums
        self.loss_scale = loss_scale
        self.units = 0
        # Inputs are summed relative to the mean of the first batch: large means cancel before they are squared, and
        # the sampling error is that of the centred moment.
        self.shift: dict[str, Tensor] = {}
        self.total: dict[str, Tensor] = {}
        self.inputs = {group: sums() for group in groups.values()}
        self.gradients: dict[str, Sums] = {}

    def watch(
        self, model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module], labels_of: LabelsOf | None
    ) -> None:
        """Add one batch: run a forward pass and, if ``labels_of`` is given, a backward pass of the loss."""
        mask = task.token_mask(batch)
        rows = token_rows(batch, mask) if self.tracks_rows and mask is not None else None
        with self._hooked(task, batch, layers, labels_of is not None, rows):
            with rows or nullcontext():
                logits = task.logits(model, batch)
            unit_logits = task.unit_logits(logits, batch)
            if labels_of is not None:
                targets = labels_of(unit_logits, batch)
                # The sum, not the mean, so that every unit keeps the gradient of its own loss.
                loss = nn.functional.cross_entropy(unit_logits.float(), targets, reduction="sum")
                (self.loss_scale * loss).backward()
        self.units += unit_logits.shape[0]

    @contextmanager
    def _hooked(
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

    def _row_finder(self, name: str, rows: TokenRows | None) -> Callable[[Tensor], tuple[RowOrder, Tensor | None]]:
        """Return a function from the layer's input to the order and the token numbers of its rows.

        It is called once for each run of the layer in one forward pass.
        """
        orders = iter(self.orders[name])

        def find_rows(x: Tensor) -> tuple[RowOrder, Tensor | None]:
            # The number of runs of an expert depends on the batch.
            order = next(orders, RowOrder.UNKNOWN)
            if rows is not None and order in (RowOrder.TRACKED, RowOrder.UNKNOWN):
                order = row_order(x, rows)
            return order, None if rows is None or order is not RowOrder.TRACKED else rows.rows(x)

        return find_rows

    def _input_hook(self, name: str, mask: Tensor | None, samples: int, rows: TokenRows | None) -> Callable:
        find_rows = self._row_finder(name, rows)

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            order, numbers = find_rows(args[0])
            with full_precision(x.device):
                values, valid = by_sample(x, mask, samples, order, numbers)
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
        find_rows = self._row_finder(name, rows)

        def add_gradient(gradient: Tensor, order: RowOrder, numbers: Tensor | None) -> None:
            with full_precision(gradient.device):
                values, valid = by_sample(gradient, mask, len(units), order, numbers)
                sizes = units if len(values) == len(units) else units.sum()[None]
                values = values if self.loss_scale == 1 else values / self.loss_scale
                if name not in self.gradients:
                    self.gradients[name] = self.sums()
                self.gradients[name].add(values, valid, sizes.to(values.device))

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise InputError(
                    f"the model runs {name} without keeping what gradients need (as reversible layers do), so the "
                    "increase in loss cannot be predicted; use --objective activation --allocation uniform"
                )
            order, numbers = find_rows(args[0])
            return _gradient_hook(lambda gradient: add_gradient(gradient, order, numbers))(module, args, output)

        return hook

    def _input_moment(self, group: str) -> InputMoment:
        sums = self.inputs[group]
        shift, offset = (values.to(sums.outer.device) for values in (self.shift[group], self.total[group] / sums.rows))
        # offset shiftᵀ + shift offsetᵀ + shift shiftᵀ, as two updates in place
        second = sums.outer / sums.rows
        second.addr_(offset + shift, shift).addr_(shift, offset)
        return InputMoment(second, shift + offset, sums.rows, sums.sampling())

    def result(self) -> Statistics:
        """Return the moments of everything added so far.

        Raises:
            InputError: no token reached a layer, or the loss does not depend on one.
        """
        empty = [group for group, sums in self.inputs.items() if not sums.rows]
        if empty:
            raise InputError(f"no token of this data reaches {empty[0]}; exclude it with --exclude {empty[0]!r}")
        silent = [name for name in self.groups if self.gradients and name not in self.gradients]
        if silent:
            raise InputError(f"the loss does not depend on {_exclusion(silent, self.groups)}")
        return Statistics(
            {group: self._input_moment(group) for group in self.inputs},
            dict(self.groups),
            {name: sums.outer / self.units for name, sums in self.gradients.items()},
            self.units,
            {name: sums.sampling() for name, sums in self.gradients.items()},
        )


def _gradient_hook(action: Callable[[Tensor], None]) -> Callable:
    """Return a forward hook that calls ``action`` with the gradient of the module's output."""

    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # All parameters are frozen, so the graph starts at the first selected layers. The clone protects the leaf from
        # models that work in place.
        tracked = output if output.requires_grad else output.requires_grad_().clone()
        tracked.register_hook(action)
        return tracked

    return hook


def _units_by_sample(task: Task, batch: Batch) -> Tensor:
    """Return the number of units of loss in each sample (B)."""
    samples = ({key: value[row : row + 1] for key, value in batch.items()} for row in range(sample_count(batch)))
    return torch.tensor([len(task.unit_labels(sample)) for sample in samples])


def _loss_scale(model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module]) -> float:
    """Return a power of two that scales the largest gradients to about `LARGEST_GRADIENT`.

    They are measured with the least likely label of every unit, so that no batch has much larger ones.
    """
    sizes: list[Tensor] = []
    hook = _gradient_hook(lambda gradient: sizes.append(gradient.abs().amax().float()))
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


def _chain(first: Batch, rest: Iterator[Batch]) -> Iterator[Batch]:
    yield first
    yield from rest
