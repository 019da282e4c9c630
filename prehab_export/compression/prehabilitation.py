"""Prehab (arXiv 2512.01980): a short fine-tuning that moves a model towards weights that truncation hurts less.

Minimises ``L_task + λ · mean_ℓ w_ℓ R(M_ℓ) / R(M_ℓ at the start)`` over the weights, where ``M = G^½ W C^½`` is the
whitened weight, R one of ``surrogates`` and w the weights of the layers, of mean 1. Either the surrogate's closed-form
gradient joins ``.grad`` after the task's backward pass, or the weight takes proximal steps beside the optimiser. Every
layer is evaluated once in a few steps, the layers taking turns so that all steps cost the same; the moments and ranks
behind the surrogates are refreshed more seldom.
"""

from collections.abc import Callable

from torch import nn

from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.calibration import Gather, calibrate
from prehab_export.compression.regulariser import Regulariser
from prehab_export.compression.training import Row, Trainable, frozen_copy, labelled_loss, one_cycle, train
from prehab_export.config import PrehabConfig, TruncateConfig
from prehab_export.inputs import Samples
from prehab_export.system import Progress, named, silent

# λ climbs by this factor over the warm-up half of the run.
WARMUP_SPAN = 1e3


def prehab(
    calibrated: Calibrated,
    samples: Samples,
    config: PrehabConfig,
    truncation: TruncateConfig,
    *,
    evaluate: Callable[[nn.Module], Row] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Row]:
    """Fine-tune the model in place towards the truncation that will follow.

    Args:
        calibrated: with gradient moments where ``config`` or ``truncation`` needs them. Its moments are those of the
            model as it was; moments gathered on the way take their labels from where these did.
        truncation: how the model will be cut; sets the ranks that ``tail`` aims at.
        evaluate: figures of the dense model (its metric), asked for at every refresh and at the end.

    Returns:
        One row a step: task_loss, surrogate (mean over layers, 1 at the start), strength, learning_rate, and the
        figures of ``evaluate`` on the rows where it was asked. The surrogate is each layer's latest value.

    Raises:
        InputError: gradient moments are needed and there are none.
    """
    model, task, current = calibrated.model, calibrated.task, calibrated.statistics
    regulariser = Regulariser(calibrated, config, truncation, seed=seed)
    regulariser.refresh(current)
    # How well these moments are known is of no use: they only move a running average.
    gather = Gather(bool(current.gradients), current.labels, sampling=False, keep_on=current.device)

    def after_backward(step: int) -> Row:
        nonlocal current
        row: Row = {}
        if step and step % config.refresh_every == 0:
            batches = samples.subset(config.refresh_samples, seed=seed + step).batches(config.train.batch_size)
            fresh = calibrate(model, task, batches, calibrated.layers, gather=gather, seed=seed + step)
            current = current.blended(fresh.statistics, 0.5)
            regulariser.refresh(current)
        if step % config.refresh_every == 0 and evaluate is not None:
            row |= evaluate(model)
        strength = _strength(step, config)
        if config.update == "proximal":
            regulariser.shrink(step, strength * config.train.learning_rate * one_cycle(step, config.train))
        else:
            regulariser.add_gradients(step, strength)
        return row | {"surrogate": regulariser.value, "strength": strength}

    teacher = frozen_copy(model) if config.train.distill > 0 else None
    history = train(
        Trainable(model, list(model.parameters()), precision=task.precision),
        samples,
        config.train,
        labelled_loss(task, teacher, config.train.distill),
        after_backward=after_backward,
        seed=seed,
        progress=named(progress, "prehab"),
    )
    if evaluate is not None and history:
        history[-1] |= evaluate(model)
    return history


def _strength(step: int, config: PrehabConfig) -> float:
    strength = float(config.strength)  # a number by now, whatever was asked for
    if config.schedule == "constant":
        return strength
    climbed = min(1.0, 2 * step / max(1, config.train.steps))
    return strength * WARMUP_SPAN ** (climbed - 1)
