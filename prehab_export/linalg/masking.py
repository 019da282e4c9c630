"""Rows of real tokens, picked out of padded ones."""

from torch import Tensor


def valid_rows(values: Tensor, valid: Tensor | None) -> Tensor:
    """Rows × features in float32: those that ``valid`` marks, which has the shape of values without the last; None
    marks all."""
    rows = values.float().reshape(-1, values.shape[-1])
    return rows if valid is None or bool(valid.all()) else rows[valid.flatten()]


def real(values: Tensor, valid: Tensor) -> Tensor:
    """The rows (R, n) of values (B, T, n) that ``valid`` (B, T) marks; without a copy where it marks all."""
    return values.flatten(0, 1) if bool(valid.all()) else values[valid]
