"""Prehab (arXiv 2512.01980): fine-tunes a model briefly, so that truncation costs it less.

Prehab minimises ``L_task + λ · mean_ℓ w_ℓ R(M_ℓ) / R(M_ℓ at the start)`` over the weights, where ``M = G^½ W C^½`` is
the whitened weight, R is one of ``surrogates``, and w are layer weights with mean 1. Either the surrogate's closed-form
gradient is added to ``.grad`` after the task's backward pass, or the weight takes proximal steps in addition to those
of the optimiser. Each layer is evaluated once every few steps, and the layers take turns so that all steps cost the
same. The moments and ranks behind the surrogates are refreshed less often.
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

# λ rises by this factor over the first half of the run.
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
    """Fine-tune the model in place to prepare it for truncation.

    Args:
        calibrated: must hold gradient moments if ``config`` or ``truncation`` needs them. Its moments are those before
            prehab; moments gathered during prehab use the same kind of labels.
        truncation: how the model will be truncated; determines the ranks that ``tail`` aims at.
        evaluate: returns figures of the dense model (its metric); called at every refresh and at the end.

    Returns:
        One row per step: task_loss, surrogate (mean over layers, 1 at the start), strength, learning_rate, and the
        figures of ``evaluate`` in steps in which it was called. The surrogate uses each layer's latest value.

    Raises:
        InputError: gradient moments are needed but missing.
    """
    model, task, current = calibrated.model, calibrated.task, calibrated.statistics
    regulariser = Regulariser(calibrated, config, truncation, seed=seed)
    regulariser.refresh(current)
    # The sampling error of these moments is not needed: they only update a running average.
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
    strength = float(config.strength)  # "auto" has been replaced by a number at this point
    if config.schedule == "constant":
        return strength
    progress = min(1.0, 2 * step / max(1, config.train.steps))
    return strength * WARMUP_SPAN ** (progress - 1)
