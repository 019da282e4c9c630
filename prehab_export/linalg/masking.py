"""Pick the rows of real tokens out of padded batches."""

from torch import Tensor


def valid_rows(values: Tensor, valid: Tensor | None) -> Tensor:
    """Return the valid rows as a matrix, rows × features, float32.

    Args:
        values: (…, features).
        valid: bool of shape (…), True for rows to take; None takes all.
    """
    rows = values.float().reshape(-1, values.shape[-1])
    return rows if valid is None or bool(valid.all()) else rows[valid.flatten()]


def real(values: Tensor, valid: Tensor) -> Tensor:
    """Return the rows (R, n) of values (B, T, n) that ``valid`` (B, T) marks; no copy if it marks all."""
    return values.flatten(0, 1) if bool(valid.all()) else values[valid]
