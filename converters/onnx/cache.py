"""The key/value cache of a decoder as plain tensors, learnt from the model itself rather than from its config."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from converters.errors import InputError


@dataclass(frozen=True)
class CacheLayout:
    """(heads, width) of every layer's key and value, in the order of the layers, and their dtype."""

    past: dict[str, tuple[int, int]]
    dtype: torch.dtype

    @property
    def present_names(self) -> tuple[str, ...]:
        return tuple(name.replace("past_key_values", "present") for name in self.past)


def cache_layout(model: PreTrainedModel) -> CacheLayout:
    """Run the model on two tokens and look at the cache that it returns.

    Raises:
        InputError: the model keeps anything but one key and one value tensor per layer.
    """
    kind = type(model).__name__
    if model.config.is_encoder_decoder or "past_key_values" not in inspect.signature(model.forward).parameters:
        raise InputError(f"{kind} is not a decoder with a key/value cache; text-generation needs one")
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    try:
        layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    except Exception as error:
        raise InputError(f"{kind} does not run on two tokens with a cache: {error}") from error
    past: dict[str, tuple[int, int]] = {}
    for index, layer in enumerate(layers):
        # A sliding window only drops what the mask hides anyway, so a full cache serves it too.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise InputError(
                f"layer {index} of {kind} keeps {type(layer).__name__}, not one key and one value tensor: "
                "only decoders with plain attention in every layer can be exported for text-generation"
            )
        past[f"past_key_values.{index}.key"] = (layer.keys.shape[1], layer.keys.shape[3])
        past[f"past_key_values.{index}.value"] = (layer.values.shape[1], layer.values.shape[3])
    return CacheLayout(past, layers[0].keys.dtype)


def cache_of(tensors: Sequence[Tensor]) -> DynamicCache:
    """key, value, key, value, … as a full cache (never sliding), whatever the config says."""
    return DynamicCache(list(zip(tensors[::2], tensors[1::2], strict=True)))


def tensors_of(cache: DynamicCache) -> list[Tensor]:
    return [tensor for key, value, *_ in cache for tensor in (key, value)]
