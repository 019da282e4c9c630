"""Loads a model folder, factored or dense, without a copy of its weights in memory."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from converters.dtypes import cast_weights, main_dtype
from converters.folder import from_pretrained
from converters.onnx.stored import HALF
from prehab_export.inputs import widen_on_use


def load_mapped(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a folder with its weights mapped from their files, in the dtype in which they are stored.

    The model computes in float32, with the same results as a model that was loaded in float32. The weights of a block
    are converted when it runs.

    Raises:
        InputError: as for `converters.folder.from_pretrained`.
    """
    model = from_pretrained(folder, trust_remote_code=trust_remote_code)
    dtype = main_dtype(model)
    if dtype in HALF and _computed_in(model, dtype):
        # Tables that a model computes while it is loaded have the precision of its weights. Then the model is loaded
        # in float32 and rounded, which takes the memory of a float32 model, but keeps the tables as they are.
        model = from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
        cast_weights(model, dtype)
    widen_on_use(model)
    return model


def _computed_in(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a tensor of the model that is not stored in its folder has this dtype."""
    stored = model.state_dict().keys()
    return any(buffer.dtype == dtype and name not in stored for name, buffer in model.named_buffers())
