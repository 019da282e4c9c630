"""Small tools for looking at what flows through a model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def valid_rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """Flatten to tokens × features in float32, without padding.

    A layer may see (B, T, d) or (B·T, d); a tensor of another shape (a pooled one, say) has no padding to drop.
    """
    rows = values.reshape(-1, values.shape[-1]).float()
    per_token = mask is not None and (values.shape[:-1] == mask.shape or values.shape[:-1] == (mask.numel(),))
    return rows[mask.reshape(-1)] if mask is not None and per_token else rows


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
