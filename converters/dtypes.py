"""Round a model's weights to the number format in which they are stored.

transformers loads a folder in one dtype, except for a few tensors that an architecture keeps in float32 in any case
(the ``_keep_in_fp32_modules`` of its class, and parameters that its code creates in float32). Weights that are rounded
here load with exactly the same bits.
"""

import copy
import re
from collections import Counter

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from converters.errors import InputError
from converters.number_formats import WEIGHT_FORMATS

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in WEIGHT_FORMATS}


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype as in config.json: ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def main_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of most of the model's floating-point parameters, measured in bytes."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.nbytes
    return sizes.most_common(1)[0][0]


@torch.no_grad()
def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Round the model's weights to ``dtype``, in place; returns the model.

    Tensors that are not saved (such as tables of rotary frequencies) do not change. So casting to bfloat16 and back to
    float32 rounds the weights to bfloat16 and changes nothing else.

    Raises:
        InputError: a weight is too large for the dtype; the model is unchanged.
    """
    tensors, dtypes = _saved_tensors(model), loaded_dtypes(model, dtype)
    for name, tensor in tensors.items():
        check_range(name, tensor, dtypes[name])
    for name, tensor in tensors.items():
        tensor.data = tensor.data.to(dtypes[name])
    return model


def holds_exactly(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether rounding the model's weights to ``dtype`` would change none of them."""
    dtypes = loaded_dtypes(model, dtype)
    tensors = _saved_tensors(model)
    return all(torch.equal(tensor.to(dtypes[name]).to(tensor.dtype), tensor) for name, tensor in tensors.items())


def check_range(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Check that no finite value of a tensor becomes infinite in ``dtype``.

    Raises:
        InputError: one does; the message calls the tensor ``name``.
    """
    if not tensor.numel() or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return
    largest = tensor.detach().abs().max()
    if largest.isfinite() and largest.to(dtype).isinf():
        raise InputError(
            f"{name} holds {float(largest):.4g}, and {name_of(dtype)} ends at {torch.finfo(dtype).max:.4g}; "
            "use --dtype bfloat16 or float32"
        )


def loaded_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype that each saved floating-point tensor has after loading in ``dtype``, by name."""
    tensors = _saved_tensors(model)
    if dtype == torch.float32:
        return dict.fromkeys(tensors, dtype)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        fresh = type(model)._from_config(config, dtype=dtype).state_dict()
    float32_modules = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        float32_modules |= set(model._keep_in_fp32_modules or ())
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in float32_modules]

    def loaded_dtype(name: str) -> torch.dtype:
        if any(pattern.search(name) for pattern in patterns):
            return torch.float32
        return fresh[name].dtype if name in fresh else dtype  # a model built from the config has no factors

    return {name: loaded_dtype(name) for name in tensors}


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point parameters and buffers that are saved, by name; the tensors themselves, not copies."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
