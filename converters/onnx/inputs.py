"""Build the inputs of a graph for each task: names, example tensors and free axes."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from converters import model_config
from converters.errors import InputError
from converters.onnx.cache import CacheLayout

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

# Sizes of the example: above 1, because a traced 1 becomes a constant, and all different.
BATCH, SEQUENCE, PAST = 2, 3, 5

Axes = dict[int, str]


@dataclass(frozen=True)
class GraphInputs:
    """Example tensors by input name, and the names of their free axes by input name and index."""

    tensors: dict[str, Tensor]
    axes: dict[str, Axes]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)


def image_inputs(
    model: PreTrainedModel, image_size: tuple[int, int] | None = None, samples: Mapping[str, Tensor] | None = None
) -> GraphInputs:
    """Build ``pixel_values`` (batch, channels, height, width), from ``samples`` if given; only the batch is free.

    Raises:
        InputError: the image size is not given, not in the config, and there is no sample.
    """
    if samples is not None:
        pixels = _rows(samples["pixel_values"].to(model.device, model.dtype))
        return GraphInputs({"pixel_values": pixels}, {"pixel_values": {0: "batch_size"}})
    size = image_size or model_config.image_size(model.config)
    if size is None:
        raise InputError(
            f"the config of {type(model).__name__} has no image_size; set it to the height and width in pixels"
        )
    shape = (BATCH, model_config.image_channels(model.config) or 3, *size)
    pixels = torch.zeros(shape, dtype=model.dtype, device=model.device)
    return GraphInputs({"pixel_values": pixels}, {"pixel_values": {0: "batch_size"}})


def text_inputs(
    model: PreTrainedModel, offered: Sequence[str] | None, samples: Mapping[str, Tensor] | None = None
) -> GraphInputs:
    """Build token inputs (batch, sequence): those of TEXT_INPUTS that are offered and that the model uses.

    Tokens are those of ``samples`` (B, T) if given. Otherwise they are ordinary ones followed by those that end a text,
    since some models search for these.

    Args:
        offered: names of the inputs that the tokenizer produces; None for all.

    Raises:
        InputError: ``offered`` lacks ``input_ids``, or the model does not take them.
    """
    if offered is not None and "input_ids" not in offered:
        raise InputError(f"text_inputs must contain input_ids, got {list(offered)}")
    if not _takes(model, "input_ids"):
        raise InputError(f"{type(model).__name__} does not take input_ids: it is not a text model")
    names = [name for name in TEXT_INPUTS if _takes(model, name) and (offered is None or name in offered)]
    if samples is not None and samples["input_ids"].shape[1] < SEQUENCE:
        samples = None  # a length of 1 would become a constant in the graph
    if samples is None:
        ids = ordinary_tokens(model.config, BATCH, SEQUENCE).to(model.device)
    else:
        ids = _rows(samples["input_ids"].to(model.device))
    values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    if samples is not None:
        values |= {name: _rows(samples[name].to(model.device)) for name in names if name in samples}
    axes = {0: "batch_size", 1: "sequence_length"}
    return GraphInputs({name: values[name] for name in names}, dict.fromkeys(names, axes))


def decoder_inputs(
    model: PreTrainedModel, layout: CacheLayout, samples: Mapping[str, Tensor] | None = None
) -> GraphInputs:
    """Build ``input_ids`` (B, S), ``attention_mask`` (B, P+S), ``position_ids`` (B, S) if the model takes them, and the
    cache inputs of ``layout``, such as ``past_key_values.{i}.key/value`` (B, heads, P, width)."""
    ids = ordinary_tokens(model.config, BATCH, SEQUENCE).to(model.device)
    if samples is not None and samples["input_ids"].shape[1] >= SEQUENCE:
        ids = _rows(samples["input_ids"][:, :SEQUENCE].to(model.device))
    mask = torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.long, device=model.device)
    tensors = {"input_ids": ids, "attention_mask": mask}
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


def ordinary_tokens(config: PreTrainedConfig, rows: int, length: int) -> Tensor:
    """Build ids (rows, length) like those of a text: no special tokens, except that each row ends with the tokens that
    mark its end."""
    end_ids = model_config.special_tokens(config)[: length - 1]
    special = {*end_ids, model_config.padding_token(config)}
    size = model_config.vocabulary_size(config) or rows * length + len(special)
    ordinary = [token for token in range(min(size, 100)) if token not in special] or [0]
    count = length - len(end_ids)
    ids = torch.tensor([ordinary[index % len(ordinary)] for index in range(1, rows * count + 1)])
    return torch.cat([ids.reshape(rows, count), torch.tensor(end_ids, dtype=torch.long).expand(rows, -1)], dim=1)


def distinguishes_token_types(model: PreTrainedModel) -> bool:
    """Whether the model has learnt several token types. RoBERTa takes ``token_type_ids`` but knows only one type; GPT-2
    takes them but would look them up among its words."""
    types = model_config.token_types(model.config)
    if types is not None:
        return types >= 2
    return any(part in name for name, _ in model.named_parameters() for part in ("token_type", "seg_embed"))


def _takes(model: PreTrainedModel, name: str) -> bool:
    """Whether the model uses an input of this name."""
    if name == "token_type_ids" and not distinguishes_token_types(model):
        return False
    return name in inspect.signature(model.forward).parameters


def _rows(values: Tensor) -> Tensor:
    """The first ``BATCH`` rows, repeated if there are fewer."""
    return values[torch.arange(BATCH, device=values.device) % len(values)].contiguous()
