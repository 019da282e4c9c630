"""Defines the tasks: how a model of each kind is run, and what one unit of its loss is.

A *unit* is one term of the cross-entropy: a sample for a classifier, a predicted token for a language model.
Calibration, training and evaluation are written in terms of units, so they work for every task.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prehab_export.config import check_precision
from prehab_export.inputs.devices import autocast, device_of

Batch = dict[str, Tensor]

# The label that cross-entropy ignores, everywhere in PyTorch and transformers.
IGNORED = -100


@dataclass(frozen=True)
class Task:
    """How to run a model of one kind and read its outputs: one row of `TASKS`, possibly at another precision.

    Shapes: B samples per batch, T tokens, K classes or vocabulary entries, U units. Batches are on the model's device.

    auto_class: name of the transformers class that loads such a model.
    metric: ``accuracy`` (higher is better) or ``perplexity`` (lower is better).
    forward: (model, batch) → logits (B, K) or (B, T, K); the model does not see the labels.
    unit_logits: (logits, batch) → (U, K).
    unit_labels: (batch) → (U), aligned with ``unit_logits``.
    token_mask: (batch) → bool (B, T), True for real tokens; None if every position counts.
    precision: ``float32``, ``bfloat16`` or ``float16`` for the forward pass; the dtype of the weights does not change.
    """

    name: str
    auto_class: str
    metric: str
    forward: Callable[[nn.Module, Batch], Tensor]
    unit_logits: Callable[[Tensor, Batch], Tensor]
    unit_labels: Callable[[Batch], Tensor]
    token_mask: Callable[[Batch], Tensor | None]
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_precision(self.precision)

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "accuracy"

    def at(self, precision: str) -> "Task":
        """Return the same task with forward passes in this precision.

        Raises:
            InputError: there is no such precision.
        """
        return replace(self, precision=precision)

    def running(self, model: nn.Module) -> AbstractContextManager[object]:
        """Run the model, or parts of it, inside this context in the task's precision."""
        return autocast(device_of(model), self.precision)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's logits (B, K) or (B, T, K), in the precision of the forward pass."""
        with self.running(model):
            return self.forward(model, batch)

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of every unit in nats (U), in float32 or higher precision."""
        unit_logits = self.unit_logits(logits, batch)
        if unit_logits.dtype in (torch.float16, torch.bfloat16):
            unit_logits = unit_logits.float()
        return nn.functional.cross_entropy(unit_logits, self.unit_labels(batch), reduction="none")


def sample_count(batch: Batch) -> int:
    """Return the number of samples in the batch."""
    return next(iter(batch.values())).shape[0]


def model_inputs(batch: Batch) -> Batch:
    """Return the batch without its labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def _classifier_logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(**model_inputs(batch), **_without_cache(model)).logits


def _without_cache(model: nn.Module) -> dict[str, bool]:
    """Return the arguments that keep a model from filling a cache nobody reads.

    A classifier on a decoder fills one by default, and so does each of its blocks, every time it runs.
    """
    parameters = inspect.signature(model.forward).parameters
    return {name: False for name in ("use_cache", "use_mems") if name in parameters}


def _decoder_logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(**model_inputs(batch), use_cache=False).logits


def _sample_logits(logits: Tensor, batch: Batch) -> Tensor:
    return logits[batch["labels"] != IGNORED]


def _sample_labels(batch: Batch) -> Tensor:
    labels = batch["labels"]
    return labels[labels != IGNORED]


def _token_logits(logits: Tensor, batch: Batch) -> Tensor:
    return logits[:, :-1][_next_tokens(batch) != IGNORED]


def _token_labels(batch: Batch) -> Tensor:
    targets = _next_tokens(batch)
    return targets[targets != IGNORED]


def _next_tokens(batch: Batch) -> Tensor:
    """Return the token that each position except the last has to predict (B, T−1), `IGNORED` if that is padding.

    Without ``labels`` every real token is a target.
    """
    targets = batch.get("labels", batch["input_ids"])[:, 1:]
    mask = batch.get("attention_mask")
    return targets if mask is None else targets.masked_fill(mask[:, 1:] == 0, IGNORED)


def _attended(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()


def _every_position(_batch: Batch) -> None:
    return None


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="image-classification",
            auto_class="AutoModelForImageClassification",
            metric="accuracy",
            forward=_classifier_logits,
            unit_logits=_sample_logits,
            unit_labels=_sample_labels,
            token_mask=_every_position,
        ),
        Task(
            name="text-classification",
            auto_class="AutoModelForSequenceClassification",
            metric="accuracy",
            forward=_classifier_logits,
            unit_logits=_sample_logits,
            unit_labels=_sample_labels,
            token_mask=_attended,
        ),
        Task(
            name="text-generation",
            auto_class="AutoModelForCausalLM",
            metric="perplexity",
            forward=_decoder_logits,
            unit_logits=_token_logits,
            unit_labels=_token_labels,
            token_mask=_attended,
        ),
    )
}
