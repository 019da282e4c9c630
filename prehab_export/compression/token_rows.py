"""Tracks the tokens of a batch through a model."""

from torch import Tensor

from prehab_export.compression.dataflow import TokenRows
from prehab_export.inputs import Batch, model_inputs


def token_rows(batch: Batch, mask: Tensor | None) -> TokenRows:
    """Return a `TokenRows` context that tracks the tokens of this batch through a forward pass.

    Args:
        mask: bool (B, T), as from ``Task.token_mask``; without one, the shape of the first input gives B and T.
    """
    inputs = list(model_inputs(batch).values())
    samples, tokens = (mask if mask is not None else inputs[0]).shape[:2]
    rows = TokenRows((samples, tokens))
    rows.start(*inputs)
    return rows
