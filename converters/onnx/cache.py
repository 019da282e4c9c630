"""Describe a decoder's key/value cache as plain tensors, from a run of the model rather than from its config."""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from converters.errors import InputError
from converters.model_config import has_encoder_and_decoder


class CacheLayout:
    """The inputs for a decoder's cache: ``past_key_values.{i}.key/value`` (B, heads, P, width), in the order of layers.

    Args:
        past: (heads, width) by name of the input.
        dtype: dtype of the cache.
    """

    def __init__(self, past: dict[str, tuple[int, int]], dtype: torch.dtype) -> None:
        self.past, self.dtype = past, dtype

    @property
    def mixes_latents(self) -> bool:
        """Whether the attention of any layer works on latents instead of keys or values."""
        return False

    @property
    def present_names(self) -> tuple[str, ...]:
        """The names of the outputs for the cache after a step."""
        return tuple(name.replace("past_key_values", "present") for name in self.past)

    @property
    def bytes_per_token(self) -> int:
        return sum(math.prod(shape) for shape in self.past.values()) * self.dtype.itemsize

    def run(self, model: PreTrainedModel, inputs: dict[str, Tensor], past: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run one step; returns the logits and the cache after it."""
        pairs = list(zip(past[::2], past[1::2], strict=True))
        # Always a full cache, never a sliding one, whatever the config says.
        output: Any = model(**inputs, past_key_values=DynamicCache(pairs), use_cache=True)
        return (output.logits, *(tensor for key, value, *_ in output.past_key_values for tensor in (key, value)))

    @contextmanager
    def attention(self, base: str) -> Iterator[str]:
        """Yield the name of the attention to trace with; ``base`` is the one that is used without a cache."""
        yield base


def cache_layout(model: PreTrainedModel) -> CacheLayout:
    """Find the layout by running the model on two tokens and inspecting the cache that it returns.

    Raises:
        InputError: the model is no decoder, or does not cache exactly one key and one value tensor per layer.
    """
    kind = type(model).__name__
    if has_encoder_and_decoder(model.config) or "past_key_values" not in inspect.signature(model.forward).parameters:
        raise InputError(f"{kind} is not a decoder with a key/value cache; text-generation needs one")
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    try:
        layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    except Exception as error:
        raise InputError(f"{kind} does not run on two tokens with a cache: {error}") from error
    past: dict[str, tuple[int, int]] = {}
    for index, layer in enumerate(layers):
        # A sliding window only drops tokens that the mask hides anyway, so a full cache works, too.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise InputError(
                f"layer {index} of {kind} keeps {type(layer).__name__}, not one key and one value tensor: "
                "only decoders with plain attention in every layer can be exported for text-generation"
            )
        past[f"past_key_values.{index}.key"] = (layer.keys.shape[1], layer.keys.shape[3])
        past[f"past_key_values.{index}.value"] = (layer.values.shape[1], layer.values.shape[3])
    return CacheLayout(past, layers[0].keys.dtype)
