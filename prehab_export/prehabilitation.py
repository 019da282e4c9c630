"""Prehab (arXiv 2512.01980): a short fine-tuning that moves a model towards weights that truncation hurts less.

Minimises ``L_task + λ · mean_ℓ R(M_ℓ) / R(M_ℓ at the start)`` over the weights, where ``M = G^½ W C^½`` is the whitened
weight and R one of ``surrogates``. The surrogate's gradient is known in closed form and is added to ``.grad``
after the task's backward pass; the moments and the bases behind it are refreshed every few steps.
"""

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from converters.lowrank import DenseLinear, add_weight_gradient, dense_weight
from prehab_export import surrogates
from prehab_export.calibration import CalibrationWarning, calibrate
from prehab_export.config import PrehabConfig, TruncateConfig
from prehab_export.data import Samples
from prehab_export.decomposition import square_root
from prehab_export.statistics import Statistics
from prehab_export.tasks import Task
from prehab_export.training import frozen_copy, train
from prehab_export.truncation import decompose_layers, layer_metric, plan_ranks

# Power iterations before the first value of ``spectral``; afterwards two a step follow the moving weight.
SETTLING = 25
# λ climbs by this factor over the warm-up half of the run.
WARMUP_SPAN = 1e3


def prehab(
    model: nn.Module,
    task: Task,
    samples: Samples,
    layers: Mapping[str, DenseLinear],
    statistics: Statistics,
    config: PrehabConfig,
    truncation: TruncateConfig,
    *,
    fisher_labels: str = "data",
    seed: int = 0,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Fine-tune the model in place towards the truncation that will follow.

    Args:
        statistics: of the model as it is now, with gradients when whitening is ``fisher``.
        truncation: how the model will be cut; sets the ranks that ``tail`` aims at.
        fisher_labels: labels behind the refreshed gradients, as in ``calibrate``.
        evaluate: figures of the dense model (its metric), asked for at every refresh and at the end.

    Returns:
        One row a step: task_loss, surrogate (mean over layers, 1 at the start), strength, learning_rate, and the
        figures of ``evaluate`` on the rows where it was asked.
    """
    regulariser = Regulariser(layers, config.surrogate, config.whitening == "fisher", truncation)
    regulariser.refresh(statistics)
    current = statistics

    def after_backward(step: int) -> dict[str, float]:
        nonlocal current
        row: dict[str, float] = {}
        if step and step % config.refresh_every == 0:
            batches = samples.subset(config.refresh_samples, seed=seed + step).batches(config.train.batch_size)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CalibrationWarning)  # a refresh only moves a running average
                fresh = calibrate(
                    model,
                    batches,
                    task,
                    layers,
                    gradients=bool(current.gradients),
                    labels=fisher_labels,
                    seed=seed + step,
                )
            current = current.blended(fresh, 0.5)
            regulariser.refresh(current)
        if step % config.refresh_every == 0 and evaluate is not None:
            row |= evaluate(model)
        strength = _strength(step, config)
        return row | {"surrogate": regulariser.add_gradients(strength), "strength": strength}

    teacher = frozen_copy(model) if config.train.distill > 0 else None
    history = train(
        model,
        task,
        samples,
        config.train,
        list(model.parameters()),
        seed=seed,
        teacher=teacher,
        after_backward=after_backward,
        progress=progress,
    )
    if evaluate is not None and history:
        history[-1] |= evaluate(model)
    return history


def _strength(step: int, config: PrehabConfig) -> float:
    if config.schedule == "constant":
        return config.strength
    climbed = min(1.0, 2 * step / max(1, config.train.steps))
    return config.strength * WARMUP_SPAN ** (climbed - 1)


# The surrogate of one layer: W (m×n) → its value and its gradient in W.
Term = Callable[[Tensor], tuple[Tensor, Tensor]]


class Regulariser:
    """The surrogate of every targeted layer, with what it caches between refreshes."""

    def __init__(
        self, layers: Mapping[str, DenseLinear], surrogate: str, use_gradients: bool, truncation: TruncateConfig
    ) -> None:
        self.layers = layers
        self.surrogate = surrogate
        self.use_gradients = use_gradients
        self.truncation = truncation
        self.terms: dict[str, Term] = {}
        self.start: dict[str, Tensor] = {}

    @torch.no_grad()
    def refresh(self, statistics: Statistics) -> None:
        """Whiten with these moments, and aim at the ranks that truncation would choose with them."""
        self.terms = {
            name: self._term(name, statistics, rank)
            for name, rank in self._ranks(statistics).items()
            if rank is not None
        }
        fresh = [name for name in self.terms if name not in self.start]
        values = {name: self.terms[name](dense_weight(self.layers[name]).float())[0] for name in fresh}
        if self.surrogate == "tail" and self.use_gradients and values:
            # In the metric of both sides a tail is a rise in loss, and layers compare: they share one scale, or a
            # layer with next to nothing to lose would weigh as much as the one that loses most.
            whole = torch.stack(list((self.start or values).values())).mean()
            values = dict.fromkeys(fresh, whole)
        self.start |= values

    @torch.no_grad()
    def add_gradients(self, strength: float) -> float:
        """Add ``λ ∂(mean of normalised surrogates)/∂W`` to every layer's ``.grad``; returns that mean."""
        total = 0.0
        for name, term in self.terms.items():
            layer = self.layers[name]
            value, gradient = term(dense_weight(layer).float())
            start = self.start[name].clamp_min(torch.finfo(torch.float32).tiny)
            total += (value / start).item()
            add_weight_gradient(layer, strength / len(self.terms) / start * gradient)
        return total / max(1, len(self.terms))

    def _ranks(self, statistics: Statistics) -> dict[str, int | None]:
        needs_spectra = self.truncation.allocation == "loss"
        decomposed = decompose_layers(self.layers, statistics, self.truncation) if needs_spectra else {}
        return plan_ranks(self.layers, decomposed, self.truncation)

    def _term(self, name: str, statistics: Statistics, rank: int) -> Term:
        layer = self.layers[name]
        metric = layer_metric(name, layer, statistics, self.truncation.gradient_damping)
        weight = dense_weight(layer).float()
        g = metric.gradient_moment if self.use_gradients else None
        root_g = torch.eye(weight.shape[0], device=weight.device) if g is None else square_root(g).float()
        root_c = square_root(metric.second_moment).float()
        if self.surrogate == "tail":
            return _tail_term(weight, root_g, root_c, rank)
        return _whitened_term(self.surrogate, root_g, root_c, root_g @ weight @ root_c)


def _tail_term(weight: Tensor, root_g: Tensor, root_c: Tensor, rank: int) -> Term:
    """``tail`` with its projector held: a quadratic form ⟨W, A W B⟩, two products a step and no decomposition."""
    basis = surrogates.top_basis(root_g @ weight @ root_c, rank)
    if weight.shape[0] <= weight.shape[1]:
        rest = root_g - root_g @ basis @ basis.T
        a, b = rest @ rest.T, root_c @ root_c
    else:
        rest = root_c - root_c @ basis @ basis.T
        a, b = root_g @ root_g, rest @ rest.T

    def term(w: Tensor) -> tuple[Tensor, Tensor]:
        form = a @ w @ b
        return (w * form).sum(), 2 * form

    return term


def _whitened_term(surrogate: str, root_g: Tensor, root_c: Tensor, now: Tensor) -> Term:
    vector = torch.ones(root_c.shape[0], device=root_c.device)
    for _ in range(SETTLING if surrogate == "spectral" else 0):
        vector = surrogates.spectral(now, vector)[2]

    def term(w: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal vector
        matrix = root_g @ w @ root_c
        if surrogate == "spectral":
            value, gradient, vector = surrogates.spectral(matrix, vector)
        else:
            value, gradient = (surrogates.nuclear if surrogate == "nuclear" else surrogates.stable_rank)(matrix)
        return value, root_g @ gradient @ root_c

    return term
