"""Small tools for looking at what flows through a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch
from torch import Tensor, nn

from prehab_export.compression.dataflow import TokenRows


class Place(Enum):
    """How the rows of a layer's input stand to the tokens of the batch."""

    IN_ORDER = "row b·T + t is token t of sample b"
    FOLLOWED = "tokens in an order of their own, or some of them (an expert's); to be followed in every batch"
    FOREIGN = "not made from tokens (a table of relative positions): the same for all of them, and no padding"
    UNKNOWN = "made from tokens, but nobody can tell which row is which"


def place_of(x: Tensor, rows: TokenRows | None) -> Place:
    """Of a layer's input (…×n), as ``rows`` has followed it."""
    if rows is None:
        return Place.UNKNOWN
    if not rows.knows(x):
        return Place.FOREIGN
    numbers = rows.rows(x)
    if numbers is None:
        return Place.UNKNOWN
    count = rows.shape[0] * rows.shape[1]
    in_order = numbers.numel() == count and bool((numbers.flatten() == torch.arange(count).to(numbers)).all())
    return Place.IN_ORDER if in_order else Place.FOLLOWED


def by_sample(
    values: Tensor, mask: Tensor | None, samples: int, place: Place = Place.UNKNOWN, numbers: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Samples × tokens × features in float32, and which of those tokens are real (samples × tokens).

    A layer may see (B, T, d), (B·T, d) or (B, H, W, d), samples outermost. Where places are not known, a tensor whose
    rows are not B·T (a pooled one, say) has no padding to drop. Rows that do not divide into the samples count as one
    sample, and so do those that were not made from tokens.

    Args:
        values: …×n.
        mask: bool (B, T), real tokens; None when every position counts.
        numbers: token numbers (b·T + t) of the rows, −1 for none, where they are followed.
    """
    width = values.shape[-1]
    rows = values.numel() // width
    if place is Place.FOLLOWED and mask is not None and numbers is not None:
        return _by_number(values.reshape(rows, width).float(), mask, numbers.flatten().long())
    if place is Place.FOREIGN:
        return values.reshape(1, rows, width).float(), torch.ones(1, rows, dtype=torch.bool, device=values.device)
    split = values.reshape(samples if rows % samples == 0 else 1, -1, width).float()
    if mask is not None and rows == mask.numel():
        return split, mask.reshape(split.shape[:2]).to(split.device)
    return split, torch.ones(split.shape[:2], dtype=torch.bool, device=split.device)


def _by_number(values: Tensor, mask: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Every row (R×n) where its token belongs; all in one sample where a token has several rows."""
    known = numbers >= 0
    if not bool(known.all()):
        values, numbers = values[known], numbers[known]
    if len(numbers.unique()) < len(numbers):
        return values[None], mask.flatten()[numbers][None]
    placed = values.new_zeros(mask.numel(), values.shape[1])
    placed[numbers] = values
    there = torch.zeros_like(mask).flatten()
    there[numbers] = True
    return placed.reshape(*mask.shape, -1), there.reshape(mask.shape) & mask


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
