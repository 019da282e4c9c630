"""Rehab: trains a truncated model briefly, and keeps each part of the training only if it helped.

There are three methods. ``factors`` tunes both factors and the bias of every compressed layer together. ``all`` also
tunes everything that was never cut: embeddings, norms, the head. ``lora`` trains LoRA adapters with PEFT, first on
``up``, then on ``down`` (SVD-LLM, arXiv 2403.07378), and merges them. Ranks never change.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from converters.lowrank import low_rank_layers, share_down, shared_groups
from prehab_export.compression.factored import Factored
from prehab_export.compression.training import Row, Trainable, labelled_loss, train
from prehab_export.config import RehabConfig
from prehab_export.inputs import Samples
from prehab_export.system import Progress, named, silent


@dataclass(frozen=True)
class Rehabilitation:
    """The result of `rehab`.

    history: one row per step.
    parts: held-out loss at the start and after each part, and whether the part was kept.
    """

    history: list[Row]
    parts: list[dict]


def rehab(
    factored: Factored,
    samples: Samples,
    config: RehabConfig,
    *,
    held_out_loss: Callable[[nn.Module], float],
    teacher: nn.Module | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Rehabilitation:
    """Train the compressed model in place; after each part, the held-out loss decides whether the part is kept.

    Args:
        held_out_loss: model → mean loss on samples that training never sees.
        teacher: the dense model, needed if ``config.train.distill`` is above 0.
    """
    model = factored.model
    best, loss = held_out_loss(model), labelled_loss(factored.task, teacher, config.train.distill)
    parts: list[dict] = [{"part": "truncated", "held_out_loss": best, "kept": True}]
    history: list[Row] = []
    for part, steps in _parts(config).items():
        parameters = list(model.parameters()) if config.method == "all" else factored.factors
        before = [parameter.detach().clone() for parameter in parameters]
        schedule, shown = replace(config.train, steps=steps), named(progress, f"rehab, {part}")
        if config.method == "lora":
            adapters = _Adapters(factored, side=part, rank=config.lora_rank, seed=seed)
            rows = train(adapters.trainable, samples, schedule, loss, seed=seed, progress=shown)
            adapters.merge()
        else:
            rows = train(factored.trainable(parameters), samples, schedule, loss, seed=seed, progress=shown)
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


class _Adapters:
    """LoRA adapters on one side of every factor pair. Merging is exact: (up + s·B A) down keeps the pair's rank."""

    def __init__(self, factored: Factored, side: str, rank: int, seed: int) -> None:
        torch.manual_seed(seed)  # PEFT draws A at random
        self.model, self.groups = factored.model, shared_groups(factored.model)
        targets = [f"{name}.{side}" for name in low_rank_layers(self.model)]
        self.wrapped = get_peft_model(self.model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        share_down(self.model, self.groups)  # PEFT wraps a shared module under its first name only
        adapters = [parameter for name, parameter in self.wrapped.named_parameters() if ".lora_" in name]
        self.trainable = Trainable(self.wrapped, adapters, precision=factored.task.precision)

    def merge(self) -> None:
        """Add the adapters to the factors, and restore the model's structure."""
        self.wrapped.merge_and_unload()
        share_down(self.model, self.groups)
