"""Assigns the rows of a layer's activations to samples and tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch
from torch import Tensor, nn

from prehab_export.compression.dataflow import TokenRows


class RowOrder(Enum):
    """How the rows of a layer's input correspond to the tokens of the batch."""

    IN_ORDER = "row b·T + t is token t of sample b"
    TRACKED = "tokens in another order, or only some of them (an expert's); tracked anew in every batch"
    FOREIGN = "not computed from tokens (a table of relative positions): the same for all samples, without padding"
    UNKNOWN = "computed from tokens, but it is unknown which row is which token"


def row_order(x: Tensor, rows: TokenRows | None) -> RowOrder:
    """Return how the rows of a layer's input (…×n) correspond to tokens, as tracked by ``rows``."""
    if rows is None:
        return RowOrder.UNKNOWN
    if not rows.is_marked(x):
        return RowOrder.FOREIGN
    numbers = rows.rows(x)
    if numbers is None:
        return RowOrder.UNKNOWN
    count = rows.shape[0] * rows.shape[1]
    in_order = numbers.numel() == count and bool((numbers.flatten() == torch.arange(count).to(numbers)).all())
    return RowOrder.IN_ORDER if in_order else RowOrder.TRACKED


def by_sample(
    values: Tensor,
    mask: Tensor | None,
    samples: int,
    order: RowOrder = RowOrder.UNKNOWN,
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Group rows by sample: samples × tokens × features in float32, and a bool mask of real tokens (samples × tokens).

    A layer may see (B, T, d), (B·T, d) or (B, H, W, d), always with samples outermost. If the order of the rows is
    unknown and there are not B·T of them (after pooling, say), there is no padding to drop. Rows that cannot be divided
    evenly among the samples count as one sample, and so do rows that were not computed from tokens.

    Args:
        values: …×n.
        mask: bool (B, T), True for real tokens; None if every position counts.
        numbers: token numbers (b·T + t) of the rows if they are tracked, −1 for a row that is not a token.
    """
    width = values.shape[-1]
    rows = values.numel() // width
    if order is RowOrder.TRACKED and mask is not None and numbers is not None:
        return _by_number(values.reshape(rows, width).float(), mask, numbers.flatten().long())
    if order is RowOrder.FOREIGN:
        return values.reshape(1, rows, width).float(), torch.ones(1, rows, dtype=torch.bool, device=values.device)
    split = values.reshape(samples if rows % samples == 0 else 1, -1, width).float()
    if mask is not None and rows == mask.numel():
        return split, mask.reshape(split.shape[:2]).to(split.device)
    return split, torch.ones(split.shape[:2], dtype=torch.bool, device=split.device)


def _by_number(values: Tensor, mask: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Put every row (R×n) at its token's position; if a token has several rows, all rows form one sample."""
    is_token = numbers >= 0
    if not bool(is_token.all()):
        values, numbers = values[is_token], numbers[is_token]
    if len(numbers.unique()) < len(numbers):
        return values[None], mask.flatten()[numbers][None]
    placed = values.new_zeros(mask.numel(), values.shape[1])
    placed[numbers] = values
    present = torch.zeros_like(mask).flatten()
    present[numbers] = True
    return placed.reshape(*mask.shape, -1), present.reshape(mask.shape) & mask


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn off dropout and parameter gradients: only activations are differentiated, which halves a backward pass."""
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
