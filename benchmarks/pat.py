"""The nearest rival of prehab: proximal low-rank training as in torchao's prototype PAT, on the same steps.

``SVDGrouper`` with ``MinRankConstraint`` (a hard rank that falls to the target on a cubic schedule, then is held) or
``ProxNuclearNorm``, applied to the plain weights every ``prox_freq`` steps. Needs ``pip install torchao``.
"""

from collections.abc import Mapping

import torch
from torch import nn

from converters.lowrank import DenseLinear, dense_weight
from prehab_export.compression.training import Loss, one_cycle, only_trainable, shuffled_batches
from prehab_export.config.training import Schedule
from prehab_export.inputs.data.samples import Samples
from prehab_export.inputs.devices import device_of, moved
from prehab_export.linalg.allocation import uniform_rank

PROX_FREQ = 10
# ProxNuclearNorm's λ: the largest of 1e-4, 1e-3, 1e-2 and 1e-1 under which the task loss still fell.
NUCLEAR_LAMBDA = 1e-2


def pat(
    model: nn.Module,
    layers: Mapping[str, DenseLinear],
    samples: Samples,
    schedule: Schedule,
    loss: Loss,
    ratio: float,
    prox: str,
    seed: int,
) -> list[dict[str, float]]:
    """Train the model in place towards the uniform ranks of ``ratio``; one row a step.

    Args:
        prox: ``MinRankConstraint`` or ``ProxNuclearNorm``.
    """
    from torchao.prototype.pat import PruneOptimizer

    groups = []
    for layer in layers.values():
        m, n = dense_weight(layer).shape
        rank = uniform_rank(m, n, 1 - ratio) or min(m, n)
        group = {"params": [layer.weight], "group_type": "SVDGrouper", "prox_type": prox, "prox_freq": PROX_FREQ}
        if prox == "MinRankConstraint":
            group |= {"min_sparsity": 1 - rank / min(m, n), "min_sparsity_schedule": True}
        groups.append(group | {"reg_lambda": NUCLEAR_LAMBDA})
    selected = {id(layer.weight) for layer in layers.values()}
    groups.append({"params": [p for p in model.parameters() if id(p) not in selected]})
    base = torch.optim.AdamW(groups, lr=schedule.learning_rate, weight_decay=0.0)
    # The last fifth heals at the final rank, as its examples do.
    optimizer = PruneOptimizer(base, healing_start_step=max(2, round(0.8 * schedule.steps)))
    batches, history = shuffled_batches(samples, schedule.batch_size, seed), []
    with only_trainable(model, list(model.parameters())):
        for step in range(schedule.steps):
            for group in base.param_groups:
                group["lr"] = schedule.learning_rate * one_cycle(step, schedule)
            optimizer.zero_grad()
            value, figures = loss(model, moved(next(batches), device_of(model)))
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            optimizer.step()
            history.append({"step": step, **figures})
    return history
