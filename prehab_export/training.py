"""The one training loop, used before truncation (prehab) and after it (rehab).

Short runs only: AdamW, a linear warm-up and a cosine to zero, optional distillation from a frozen teacher. Dropout
stays off: a few hundred steps do not overfit through it, and the teacher and the statistics see the same network.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from math import cos, pi

import torch
from torch import Tensor, nn

from prehab_export.config import TrainConfig
from prehab_export.data import Samples
from prehab_export.tasks import Batch, Task

# Called between backward and the optimiser step: may add to .grad, returns figures for the history.
AfterBackward = Callable[[int], dict[str, float]]


def train(
    model: nn.Module,
    task: Task,
    samples: Samples,
    config: TrainConfig,
    parameters: Sequence[nn.Parameter],
    *,
    seed: int = 0,
    teacher: nn.Module | None = None,
    after_backward: AfterBackward | None = None,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Train ``parameters`` of the model in place; everything else stays frozen. Returns one row of figures a step.

    Raises:
        FloatingPointError: the loss is NaN or Inf.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _one_cycle(step, config))
    model.eval()
    history = []
    for step, batch in zip(range(config.steps), shuffled_batches(samples, config.batch_size, seed), strict=False):
        optimizer.zero_grad(set_to_none=True)
        row: dict[str, float] = {"step": step, "learning_rate": float(schedule.get_last_lr()[0])}
        loss, figures = _loss(model, teacher, task, batch, config.distill)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower the learning rate")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        row |= figures | (after_backward(step) if after_backward else {})
        optimizer.step()
        schedule.step()
        history.append(row)
        if progress is not None:
            progress(row)
    optimizer.zero_grad(set_to_none=True)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return history


def shuffled_batches(samples: Samples, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches without end: each epoch a fresh permutation, fixed by the seed; short last batches are dropped."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, len(samples))
    while True:
        order = torch.randperm(len(samples), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield from samples.batches(size, indices=order[start : start + size])


def frozen_copy(model: nn.Module) -> nn.Module:
    """A teacher: the model as it is now, without gradients."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def _loss(
    model: nn.Module, teacher: nn.Module | None, task: Task, batch: Batch, distill: float
) -> tuple[Tensor, dict[str, float]]:
    student = task.unit_logits(task.logits(model, batch), batch).float()
    loss = nn.functional.cross_entropy(student, task.unit_labels(batch))
    figures = {"task_loss": loss.item()}
    if teacher is not None and distill > 0:
        with torch.no_grad():
            target = task.unit_logits(task.logits(teacher, batch), batch).float()
        divergence = nn.functional.kl_div(
            student.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True
        )
        figures["distillation"] = divergence.item()
        loss = (1 - distill) * loss + distill * divergence
    return loss, figures


def _one_cycle(step: int, config: TrainConfig) -> float:
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + cos(pi * (step - warmup) / max(1, config.steps - warmup)))
