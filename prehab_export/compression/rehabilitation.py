"""Rehab: a short training of a truncated model, each part kept only when it helped.

Three methods. ``factors`` tunes both factors and the biases of every compressed layer together; ``all`` tunes with
them what was never cut: embeddings, norms, the head. ``lora`` trains LoRA adapters through PEFT, first on ``up``,
then on ``down`` (SVD-LLM, arXiv 2403.07378), and merges each. In every case the rank stays what it was.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from converters.lowrank import low_rank_layers, share_down, shared_groups
from prehab_export.compression.refinement import factor_parameters
from prehab_export.compression.training import Loss, labelled_loss, train
from prehab_export.config import RehabConfig, TrainConfig
from prehab_export.inputs import Samples, Task
from prehab_export.linalg import Bases


@dataclass(frozen=True)
class Rehabilitation:
    """history: one row a step. parts: held-out loss at the start and after each part, and whether it was kept."""

    history: list[dict[str, float]]
    parts: list[dict]


def rehab(
    model: nn.Module,
    task: Task,
    samples: Samples,
    config: RehabConfig,
    *,
    held_out_loss: Callable[[nn.Module], float],
    seed: int = 0,
    teacher: nn.Module | None = None,
    bases: Bases | None = None,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Rehabilitation:
    """Train ``model`` in place. After each part the held-out loss decides whether it stays.

    Args:
        held_out_loss: mean loss on samples that training never sees.
        teacher: the dense model, when ``config.train.distill`` is above 0.
        bases: of the factors (``eigenbasis.factor_bases``), for the methods other than ``lora``.
    """
    best, loss = held_out_loss(model), labelled_loss(task, teacher, config.train.distill)
    parts: list[dict] = [{"part": "truncated", "held_out_loss": best, "kept": True}]
    history: list[dict[str, float]] = []
    for part, share in _parts(config).items():
        parameters = list(model.parameters()) if config.method == "all" else factor_parameters(model)
        before = [parameter.detach().clone() for parameter in parameters]
        schedule = replace(config.train, steps=share)
        if config.method == "lora":
            rows = _train_adapters(
                model, samples, schedule, loss, part, config.lora_rank, task.precision, seed, progress
            )
        else:
            rows = train(
                model,
                samples,
                schedule,
                parameters,
                loss,
                bases=bases,
                precision=task.precision,
                seed=seed,
                progress=progress,
            )
        history += [row | {"step": row["step"] + len(history)} for row in rows]
        after = held_out_loss(model)
        parts.append({"part": part, "held_out_loss": after, "kept": after < best})
        if after < best:
            best = after
        else:
            _restore(parameters, before)
    return Rehabilitation(history, parts)


def _parts(config: RehabConfig) -> dict[str, int]:
    steps = config.train.steps
    return {"up": steps - steps // 2, "down": steps // 2} if config.method == "lora" else {config.method: steps}


@torch.no_grad()
def _restore(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _train_adapters(
    model: nn.Module,
    samples: Samples,
    config: TrainConfig,
    loss: Loss,
    side: str,
    rank: int,
    precision: str,
    seed: int,
    progress: Callable[[dict[str, float]], None] | None,
) -> list[dict[str, float]]:
    """LoRA on one side of every factor pair, merged exactly: (up + s·B A) down keeps the pair's rank."""
    torch.manual_seed(seed)  # PEFT draws A at random
    groups = shared_groups(model)
    targets = [f"{name}.{side}" for name in low_rank_layers(model)]
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    share_down(model, groups)  # PEFT wraps what is shared under its first name only
    adapters = [parameter for name, parameter in wrapped.named_parameters() if ".lora_" in name]
    rows = train(wrapped, samples, config, adapters, loss, precision=precision, seed=seed, progress=progress)
    wrapped.merge_and_unload()
    share_down(model, groups)
    return rows
