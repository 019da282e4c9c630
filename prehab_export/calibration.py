"""Second moments of what flows into and back out of each targeted layer, on a small sample.

Per layer: ``C = E[x xᵀ]`` and ``μ = E[x]`` over valid tokens, and, when asked for, ``G = E[Σ_t g_t g_tᵀ]`` where
``g_t = ∂ℓ/∂y_t`` is the gradient of *one unit's* loss ℓ (a sample of a classifier, a predicted token of a language
model) and the sum runs over its tokens. With these conventions ``½ tr(G Δ C Δᵀ)`` is the K-FAC-expand estimate
(arXiv 2311.00636) of the rise in mean loss, comparable across layers and tasks.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from converters.errors import InputError
from prehab_export.config import FISHER_LABELS
from prehab_export.statistics import InputMoment, Statistics
from prehab_export.tasks import Batch, Task, sample_count


class CalibrationWarning(UserWarning):
    """The sample is too small for what was asked of it; the result is valid but could be better."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    layers: Mapping[str, nn.Module],
    *,
    gradients: bool = True,
    labels: str = "data",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Run the batches through the model and gather moments of every layer in ``layers``.

    Args:
        batches: as the task makes them; padding is left out by the task's token mask.
        layers: targeted layers by name, as from ``converters.targets.target_layers``.
        gradients: also gather G (one backward pass a batch).
        labels: ``data`` takes the given labels (empirical Fisher), ``model`` samples them from the model's own
            output (true Fisher; needs no labels).
        progress: called with the number of samples done, after each batch.

    Raises:
        InputError: no batch at all, a layer that no batch reaches, or NaN/Inf in a moment (naming the layer).
    """
    if labels not in FISHER_LABELS:
        raise InputError(f"Fisher labels must be one of {', '.join(FISHER_LABELS)}, not {labels!r}")
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise InputError("the calibration sample is empty; give a split with rows in it")
    groups = shared_inputs(model, first, task, layers)
    generator = torch.Generator().manual_seed(seed)
    tally = _Tally(groups)
    with _frozen(model), torch.set_grad_enabled(gradients):
        for batch in _chain(first, iterator):
            with tally.listening(layers, task.token_mask(batch), gradients):
                logits = task.logits(model, batch)
                unit_logits = task.unit_logits(logits, batch)
                if gradients:
                    targets = task.unit_labels(batch) if labels == "data" else _sampled(unit_logits, generator)
                    # The sum, not the mean: every unit keeps the gradient of its own loss.
                    nn.functional.cross_entropy(unit_logits.float(), targets, reduction="sum").backward()
            tally.units += unit_logits.shape[0]
            if progress is not None:
                progress(sample_count(batch))
    statistics = tally.result()
    statistics.check_finite()
    if (message := few_tokens(statistics)) is not None:
        warnings.warn(message, CalibrationWarning, stacklevel=2)
    return statistics


def few_tokens(statistics: Statistics) -> str | None:
    """What to tell the user when layers have more inputs than calibration showed tokens; None when none has."""
    short = {group: m for group, m in statistics.inputs.items() if m.tokens < m.mean.numel()}
    if not short:
        return None
    group, moment = next(iter(short.items()))
    return (
        f"{moment.tokens} calibration tokens for the {moment.mean.numel()} inputs of {group}"
        + (f" and of {len(short) - 1} more" if len(short) > 1 else "")
        + "; the second moment is singular. Truncation is exact on the sample all the same; more samples make it better"
    )


def shared_inputs(model: nn.Module, batch: Batch, task: Task, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layer → input group, by watching which layers are handed the very same tensor.

    Raises:
        InputError: a layer is not reached by the model's forward pass.
    """
    seen: dict[str, list[tuple]] = {name: [] for name in layers}
    alive: list[Tensor] = []  # holds inputs until the pass ends, or an address could be used twice

    def watch(name: str) -> Callable:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            alive.append(x)
            seen[name].append((x.data_ptr(), x.shape, x.stride(), x._version))

        return hook

    one = {key: value[:1] for key, value in batch.items()}
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with _frozen(model), torch.no_grad():
            task.logits(model, one)
    finally:
        for handle in handles:
            handle.remove()
    unreached = [name for name, keys in seen.items() if not keys]
    if unreached:
        raise InputError(
            f"the model never runs {unreached[0]} on this data; leave it out with --exclude {unreached[0]!r}"
        )
    leaders: dict[tuple, str] = {}
    return {name: leaders.setdefault(tuple(keys), name) for name, keys in seen.items()}


class _Tally:
    """Running sums of outer products, gathered by hooks."""

    def __init__(self, groups: dict[str, str]) -> None:
        self.groups = groups
        self.units = 0
        self.outer: dict[str, Tensor] = {}
        self.total: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = dict.fromkeys(groups.values(), 0)
        self.gradient: dict[str, Tensor] = {}

    @contextmanager
    def listening(self, layers: Mapping[str, nn.Module], mask: Tensor | None, gradients: bool) -> Iterator[None]:
        handles = []
        for name, layer in layers.items():
            if self.groups[name] == name:
                handles.append(layer.register_forward_pre_hook(self._input_hook(name, mask)))
            if gradients:
                handles.append(layer.register_forward_hook(self._output_hook(name, mask)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _input_hook(self, name: str, mask: Tensor | None) -> Callable:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = _valid_rows(args[0].detach(), mask)
            _add(self.outer, name, rows.T @ rows)
            _add(self.total, name, rows.sum(0))
            self.tokens[name] += rows.shape[0]

        return hook

    def _output_hook(self, name: str, mask: Tensor | None) -> Callable:
        def on_gradient(gradient: Tensor) -> None:
            rows = _valid_rows(gradient, mask)
            _add(self.gradient, name, rows.T @ rows)

        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # With every parameter frozen, the graph starts at the first targeted layers. The clone keeps a model
            # that works in place from touching the leaf.
            tracked = output if output.requires_grad else output.requires_grad_().clone()
            tracked.register_hook(on_gradient)
            return tracked

        return hook

    def result(self) -> Statistics:
        inputs = {
            name: InputMoment(self.outer[name] / count, self.total[name] / count, count)
            for name, count in self.tokens.items()
        }
        silent = [name for name in self.groups if self.gradient and name not in self.gradient]
        if silent:
            raise InputError(f"{silent[0]} has no part in the loss; leave it out with --exclude {silent[0]!r}")
        gradients = {name: total / self.units for name, total in self.gradient.items()}
        return Statistics(inputs, dict(self.groups), gradients, self.units)


def _valid_rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """Flatten to tokens × features in float32, without padding.

    A layer may see (B, T, d) or (B·T, d); a tensor of another shape (a pooled one, say) has no padding to drop.
    """
    rows = values.reshape(-1, values.shape[-1]).float()
    per_token = mask is not None and (values.shape[:-1] == mask.shape or values.shape[:-1] == (mask.numel(),))
    return rows[mask.reshape(-1)] if mask is not None and per_token else rows


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value


def _sampled(unit_logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label a unit, drawn from the model's own distribution."""
    probabilities = unit_logits.detach().float().softmax(-1)
    return torch.multinomial(probabilities.cpu(), 1, generator=generator).squeeze(1).to(unit_logits.device)


def _chain(first: Batch, rest: Iterator[Batch]) -> Iterator[Batch]:
    yield first
    yield from rest


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No dropout and no parameter gradients: only activations are differentiated, which halves the backward pass."""
    training = model.training
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
