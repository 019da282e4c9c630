"""In which number format a model's weights are stored, and rounding them to it.

transformers loads a folder in one dtype, but for a few tensors that an architecture keeps in float32 whatever is asked
for (the ``_keep_in_fp32_modules`` of its class, and parameters that its code creates in float32). What is written here
is what loading gives back, bit for bit.
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
    """``bfloat16`` of ``torch.bfloat16``, as config.json has it."""
    return str(dtype).removeprefix("torch.")


def main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most of the model's floating-point parameters, by bytes."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.nbytes
    return sizes.most_common(1)[0][0]


@torch.no_grad()
def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Round the model's weights to ``dtype``, in place; returns the model.

    What its folder does not hold (tables of rotary frequencies, say) is left alone, so that casting to bfloat16 and
    back to float32 changes the weights to what bfloat16 holds of them, and nothing else.

    Raises:
        InputError: a weight is too large for the dtype; the model is unchanged.
    """
    stored, due = _stored(model), loaded_dtypes(model, dtype)
    for name, tensor in stored.items():
        check_range(name, tensor, due[name])
    for name, tensor in stored.items():
        tensor.data = tensor.data.to(due[name])
    return model


def holds_exactly(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether rounding the model's weights to ``dtype`` would change none of them."""
    due = loaded_dtypes(model, dtype)
    return all(torch.equal(tensor.to(due[name]).to(tensor.dtype), tensor) for name, tensor in _stored(model).items())


def check_range(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Refuse a tensor with values that would become infinite.

    Raises:
        InputError: there is one, named ``name``.
    """
    if not tensor.numel() or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return
    largest = tensor.detach().abs().max()
    if largest.isfinite() and largest.to(dtype).isinf():
        raise InputError(
            f"{name} holds {float(largest):.4g}, and {name_of(dtype)} ends at {torch.finfo(dtype).max:.4g}; "
            "take --dtype bfloat16 or float32"
        )


def loaded_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype that each floating-point tensor of the model's folder has once it was loaded in ``dtype``."""
    stored = _stored(model)
    if dtype == torch.float32:
        return dict.fromkeys(stored, dtype)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        made = type(model)._from_config(config, dtype=dtype).state_dict()
    kept = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in kept]

    def due(name: str) -> torch.dtype:
        if any(pattern.search(name) for pattern in patterns):
            return torch.float32
        return made[name].dtype if name in made else dtype  # factors are not in the model as its config has it

    return {name: due(name) for name in stored}


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point parameters and buffers that the model's folder holds, themselves."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
