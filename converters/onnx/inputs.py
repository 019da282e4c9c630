"""What a graph is called with, per task: names, example tensors, and which axes are free."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from converters.errors import InputError
from converters.onnx.cache import CacheLayout

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

# Sizes of the example: above 1, as a traced 1 becomes a constant, and unlike each other.
BATCH, SEQUENCE, PAST = 2, 3, 5

Axes = dict[int, str]


@dataclass(frozen=True)
class GraphInputs:
    """Example tensors by input name, and the names of their free axes."""

    tensors: dict[str, Tensor]
    axes: dict[str, Axes]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)


def image_inputs(model: PreTrainedModel, image_size: tuple[int, int] | None = None) -> GraphInputs:
    """``pixel_values`` (batch, channels, height, width); only the batch is free.

    Raises:
        InputError: the config does not say how large its images are.
    """
    size = image_size or getattr(model.config, "image_size", None)
    if size is None:
        raise InputError(
            f"the config of {type(model).__name__} has no image_size; set it to the height and width in pixels"
        )
    height, width = (size, size) if isinstance(size, int) else size
    shape = (BATCH, getattr(model.config, "num_channels", 3), height, width)
    pixels = torch.zeros(shape, dtype=model.dtype, device=model.device)
    return GraphInputs({"pixel_values": pixels}, {"pixel_values": {0: "batch_size"}})


def text_inputs(model: PreTrainedModel, offered: Sequence[str] | None) -> GraphInputs:
    """Token inputs (batch, sequence): those of TEXT_INPUTS that are offered and that the model makes use of.

    Raises:
        InputError: ``offered`` lacks input_ids.
    """
    if offered is not None and "input_ids" not in offered:
        raise InputError(f"text_inputs must have input_ids among them, got {list(offered)}")
    names = [name for name in TEXT_INPUTS if _takes(model, name) and (offered is None or name in offered)]
    values = {
        "input_ids": _token_ids(model, SEQUENCE),
        "attention_mask": _ones(model, SEQUENCE),
        "token_type_ids": torch.zeros_like(_ones(model, SEQUENCE)),
    }
    axes = {0: "batch_size", 1: "sequence_length"}
    return GraphInputs({name: values[name] for name in names}, dict.fromkeys(names, axes))


def decoder_inputs(model: PreTrainedModel, layout: CacheLayout) -> GraphInputs:
    """``input_ids`` (B, S), ``attention_mask`` (B, P+S), ``position_ids`` (B, S) where the model takes them, and
    ``past_key_values.{i}.key/value`` (B, heads, P, width)."""
    tensors = {"input_ids": _token_ids(model, SEQUENCE), "attention_mask": _ones(model, PAST + SEQUENCE)}
    axes = {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
    }
    if _takes(model, "position_ids"):
        positions = torch.arange(PAST, PAST + SEQUENCE, device=model.device)
        tensors["position_ids"] = positions.repeat(BATCH, 1)
        axes["position_ids"] = axes["input_ids"]
    for name, (heads, width) in layout.past.items():
        tensors[name] = torch.zeros(BATCH, heads, PAST, width, dtype=layout.dtype, device=model.device)
        axes[name] = {0: "batch_size", 2: "past_sequence_length"}
    return GraphInputs(tensors, axes)


def _takes(model: PreTrainedModel, name: str) -> bool:
    if name == "token_type_ids" and getattr(model.config, "type_vocab_size", 0) < 2:
        return False  # RoBERTa's forward has the argument, but one type tells nothing
    return name in inspect.signature(model.forward).parameters


def _token_ids(model: PreTrainedModel, length: int) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(1, BATCH * length + 1, device=model.device) % vocabulary
    return ids.reshape(BATCH, length)


def _ones(model: PreTrainedModel, length: int) -> Tensor:
    return torch.ones(BATCH, length, dtype=torch.long, device=model.device)
