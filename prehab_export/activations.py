"""Small tools for looking at what flows through a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def valid_rows(values: Tensor, valid: Tensor | None) -> Tensor:
    """Rows × features in float32: those that ``valid`` marks, which has the shape of values without the last; None
    marks all."""
    rows = values.float().reshape(-1, values.shape[-1])
    return rows if valid is None or bool(valid.all()) else rows[valid.flatten()]


def real(values: Tensor, valid: Tensor) -> Tensor:
    """The rows (R, n) of values (B, T, n) that ``valid`` (B, T) marks; without a copy where it marks all."""
    return values.flatten(0, 1) if bool(valid.all()) else values[valid]


def by_sample(values: Tensor, mask: Tensor | None, samples: int) -> tuple[Tensor, Tensor]:
    """Samples × tokens × features in float32, and which of those tokens are real (samples × tokens).

    A layer may see (B, T, d), (B·T, d) or (B, H, W, d), samples outermost; a tensor whose rows are not B·T (a pooled
    one, say) has no padding to drop. Rows that do not divide into the samples count as one sample.
    """
    rows = values.numel() // values.shape[-1]
    split = values.reshape(samples if rows % samples == 0 else 1, -1, values.shape[-1]).float()
    if mask is not None and rows == mask.numel():
        return split, mask.reshape(split.shape[:2]).to(split.device)
    return split, torch.ones(split.shape[:2], dtype=torch.bool, device=split.device)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No dropout and no parameter gradients: only activations are differentiated, which halves a backward pass."""
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
