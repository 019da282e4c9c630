"""Loads a model folder, factored or dense, without a copy of its weights in memory."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from converters.dtypes import cast_weights, main_dtype
from converters.folder import from_pretrained
from prehab_export.inputs import has_half_tables, widen_on_use


def load_mapped(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a folder with its weights mapped from their files, in the dtype in which they are stored.

    The model computes in float32, with the same results as a model that was loaded in float32. The weights of a block
    are converted when it runs.

    Raises:
        InputError: as for `converters.folder.from_pretrained`.
    """
    model = from_pretrained(folder, trust_remote_code=trust_remote_code)
    if has_half_tables(model):
        # Loaded in float32 and rounded, which takes the memory of a float32 model for a while, the tables are exact.
        dtype = main_dtype(model)
        model = from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
        cast_weights(model, dtype)
    widen_on_use(model)
    return model
