"""Trains a model: the one training loop, used before truncation (prehab) and after it (rehab).

It is made for short runs: AdamW, a linear warm-up and a cosine decay to zero, and optional distillation from a frozen
teacher. Dropout is off: a few hundred steps do not overfit without it, and teacher and statistics see the same network.

Processes that work together share out the parameters (see ``sharding``) and every batch, and take the steps that one
process would take. A loss is therefore this process's share of the loss of the whole batch: a sum over its own units,
divided by the number of units of all.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import cos, isfinite, pi

import torch
from torch import Tensor, nn

from converters.errors import InputError
from prehab_export.compression.sharding import ShardedCopy
from prehab_export.config import Schedule
from prehab_export.inputs import Batch, Samples, Task, device_of, gradient_scaler, moved
from prehab_export.linalg import Bases, EigenbasisAdamW
from prehab_export.system import Advance, Progress, silent, team

# The figures of one step.
Row = dict[str, float]
# (model, share of a batch) → the share of the loss to minimise, and of the figures for the history.
Loss = Callable[[nn.Module, Batch], tuple[Tensor, Row]]
# (step) → figures for the history. Called between backward pass and optimiser step; it may add to .grad.
AfterBackward = Callable[[int], Row]

# Figures that the progress bar of a training shows: name in a row → label.
NOTED = {"task_loss": "loss", "divergence": "divergence", "surrogate": "surrogate"}


@dataclass(frozen=True)
class Trainable:
    """The parameters of a model to train; all other parameters stay frozen.

    bases: parameter → the basis in which the optimiser steps it; other parameters get plain AdamW.
    precision: the precision of the forward pass (its task's).
    """

    model: nn.Module
    parameters: Sequence[nn.Parameter]
    bases: Bases = field(default_factory=dict)
    precision: str = "float32"


def train(
    trainable: Trainable,
    samples: Samples,
    schedule: Schedule,
    loss: Loss,
    *,
    after_backward: AfterBackward | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Row]:
    """Train in place, on batches drawn from the samples; return one row of figures per step.

    Raises:
        InputError: a batch has fewer samples than there are processes.
        FloatingPointError: the loss is NaN or Inf, or float16 cannot hold its gradients.
    """
    model = trainable.model
    batches, device = shuffled_batches(samples, schedule.batch_size, seed), device_of(model)
    if min(schedule.batch_size, len(samples)) < team().size:
        raise InputError(
            f"batches of {min(schedule.batch_size, len(samples))} samples cannot be shared out over {team().size} "
            "processes; train with larger batches, or start fewer processes"
        )
    model.eval()
    with only_trainable(model, trainable.parameters), progress("train", schedule.steps) as advance:
        worked_on, in_step = trainable, after_backward
        if team().size > 1:
            sharded = ShardedCopy(model, trainable.parameters, team(), _kept_from_passes(model))
            worked_on = _standing_in(trainable, sharded)
            in_step = None if after_backward is None else _on_the_model_itself(after_backward, sharded)
        history = optimise(
            worked_on,
            schedule,
            lambda _step: loss(worked_on.model, moved(_share(next(batches)), device)),
            after_backward=in_step,
            advance=advance,
        )
        if team().size > 1:
            sharded.write_back()
        return history


def _standing_in(trainable: Trainable, sharded: ShardedCopy) -> Trainable:
    """Return the same work on a copy whose parameters are shared out over processes."""
    pairs = zip(trainable.parameters, sharded.parameters, strict=True)
    bases: Bases = {part: trainable.bases[whole] for whole, part in pairs if whole in trainable.bases}
    return Trainable(sharded.model, sharded.parameters, bases, trainable.precision)


def _on_the_model_itself(after_backward: AfterBackward, sharded: ShardedCopy) -> AfterBackward:
    """Return the same function for training a copy: it sees the model itself with the weights of the copy, which
    takes over the weights and gradients that it leaves."""

    def in_step(step: int) -> Row:
        sharded.write_back()
        row = after_backward(step)
        sharded.take_over()
        return row

    return in_step


def optimise(
    trainable: Trainable,
    schedule: Schedule,
    loss_at: Callable[[int], tuple[Tensor, Row]],
    *,
    after_backward: AfterBackward | None = None,
    advance: Advance | None = None,
) -> list[Row]:
    """Minimise ``loss_at(step)`` over ``schedule.steps`` steps; return one row of figures per step.

    In float16 the loss is scaled for the backward pass only; gradients are unscaled again before clipping and before
    ``after_backward``. A step whose gradients overflow is skipped.

    Args:
        loss_at: step → this process's share of the loss, and of the figures for the step's row.

    Raises:
        FloatingPointError: the loss is NaN or Inf, or float16 cannot hold its gradients.
    """
    parameters = trainable.parameters
    scaler = gradient_scaler(parameters[0].device, trainable.precision)
    options = {"lr": schedule.learning_rate, "weight_decay": schedule.weight_decay}
    optimizer = EigenbasisAdamW(parameters, trainable.bases, **options)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, schedule))
    history: list[Row] = []
    for step in range(schedule.steps):
        optimizer.zero_grad(set_to_none=True)
        row: Row = {"step": step, "learning_rate": float(rate.get_last_lr()[0])}
        loss, figures = loss_at(step)
        value, *parts = team().totals([loss.item(), *figures.values()])
        if not isfinite(value):
            advice = "lower the learning rate" + (", or use --precision bfloat16" if scaler.is_enabled() else "")
            raise FloatingPointError(f"the loss is {value} at step {step}; {advice}")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, schedule.clip)
        row |= dict(zip(figures, parts, strict=True)) | (after_backward(step) if after_backward else {})
        if _step(scaler, optimizer, step):
            rate.step()
        history.append(row)
        if advance is not None:
            advance(1, note=", ".join(f"{name} {row[key]:.4f}" for key, name in NOTED.items() if key in row))
    optimizer.zero_grad(set_to_none=True)
    return history


def _share(batch: Batch) -> Batch:
    """Return this process's share of a batch."""
    return {name: value[team().rank :: team().size] for name, value in batch.items()}


def _step(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, step: int) -> bool:
    """Take the optimiser step and return True; if gradients overflowed, halve the scale instead and return False."""
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    if (after := scaler.get_scale()) < 1:
        raise FloatingPointError(f"gradients overflow float16 at step {step}; use --precision bfloat16")
    return after >= before


@contextmanager
def only_trainable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let only these parameters of the model require gradients, and restore all flags at the end."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def shuffled_batches(samples: Samples, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield batches forever: every epoch is a new permutation, fixed by the seed; a short last batch is dropped."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, len(samples))
    while True:
        order = torch.randperm(len(samples), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield from samples.batches(size, indices=order[start : start + size])


def frozen_copy(model: nn.Module) -> nn.Module:
    """Copy the model as it is now, without gradients, for example as a teacher."""
    return copy.deepcopy(model, _kept_from_passes(model)).eval().requires_grad_(False)


def sharing_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of a model but not its tensors: layers of the copy may be replaced, weights must not change."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, _kept_from_passes(model) | shared).eval()


def _kept_from_passes(model: nn.Module) -> dict[int, object]:
    """Return copies of tensors kept from the latest pass (a recurrent state), by identity, for ``copy.deepcopy``.

    They may be part of a graph, which it cannot copy.
    """
    tensors = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return {id(value): value.detach().clone() for value in tensors if not value.is_leaf}


def labelled_loss(task: Task, teacher: nn.Module | None = None, distill: float = 0.0) -> Loss:
    """Return the loss (1 − distill)·cross-entropy + distill·KL(teacher ‖ model), averaged over units, in nats.

    Of processes that work together, each gets its share of the average over the units of all.
    """

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Row]:
        logits = task.unit_logits(task.logits(model, batch), batch).float()
        value = nn.functional.cross_entropy(logits, task.unit_labels(batch), reduction="sum") / units_of_all(logits)
        figures = {"task_loss": value.item()}
        if teacher is not None and distill > 0:
            with torch.no_grad():
                target = task.unit_logits(task.logits(teacher, batch), batch)
            distillation = divergence(logits, target)
            figures["distillation"] = distillation.item()
            value = (1 - distill) * value + distill * distillation
        return value, figures

    return loss


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Return KL(target ‖ logits) averaged over units, in nats; both arguments are logits (U, K).

    Of processes that work together, each gets its share of the average over the units of all.
    """
    total = nn.functional.kl_div(
        logits.float().log_softmax(-1), target.float().log_softmax(-1), reduction="sum", log_target=True
    )
    return total / units_of_all(logits)


def units_of_all(logits: Tensor) -> float:
    """Return the number of units (U) of these logits (U, K) and of those of the other processes at work."""
    return team().totals([len(logits)])[0]


def one_cycle(step: int, schedule: Schedule) -> float:
    """Return the learning rate at a step, relative to its peak: a linear warm-up, then a cosine decay to zero."""
    warmup = max(1, round(schedule.warmup * schedule.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + cos(pi * (step - warmup) / max(1, schedule.steps - warmup)))
