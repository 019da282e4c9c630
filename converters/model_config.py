"""Read a model's configuration, whatever its family calls a field and whether or not it has the field.

Families have different fields: MobileBERT has no end token, convolutional networks have no vocabulary, and a model of
several modalities has nested configurations. All other modules read configurations through this one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

# The image size to use for a model that takes any size.
USUAL_IMAGE_SIZE = (224, 224)
# Fields with the number of experts that a router chooses from.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Fields with the number of positions, in configurations without an attribute map.
_POSITIONS = ("max_position_embeddings", "max_seq_len")
# Fields with the length of the texts that the model was trained on, whether or not its positions end there.
_CONTEXT_LENGTHS = (*_POSITIONS, "n_positions", "max_sequence_length", "seq_length", "n_ctx")
# Names of fields that count blocks (num_hidden_layers, n_layer, depths, block_sizes).
_COUNTS_BLOCKS = re.compile(r"(^|_)(layers?|blocks?|depths?|block_sizes|num_block_repeats)$")
# Parts of the names of fields that only count some blocks.
_COUNTS_SOME_BLOCKS = re.compile(r"shared|dense|mtp|nextn|predict|skip|group|window")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part that describes the text model, or the whole if there is only one."""
    try:
        return config.get_text_config()
    except ValueError:  # the encoder and the decoder have one each
        return config.get_text_config(decoder=True)


def vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part that describes the vision model, or the whole if there is only one."""
    nested = _read(config, "vision_config")
    return nested if isinstance(nested, PreTrainedConfig) else config


def nested_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield the configuration and all configurations nested in it, outermost first."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from nested_configs(value)


def vocabulary_size(config: PreTrainedConfig) -> int | None:
    """Return the number of token ids; None for a model without token embeddings."""
    size = _read(text_config(config), "vocab_size")
    return size if isinstance(size, int) and size > 0 else None


def in_vocabulary(token: int | None, config: PreTrainedConfig) -> bool:
    """Whether a token id is in the vocabulary. Configurations may keep the default id of another vocabulary (GPT-2:
    50256), or −1 for none."""
    size = vocabulary_size(config)
    return token is not None and token >= 0 and (size is None or token < size)


def padding_token(config: PreTrainedConfig) -> int | None:
    """Return the padding id that the configuration names, whether or not it is in the vocabulary."""
    return next(iter(tokens_named(config, "pad_token_id")), None)


def end_tokens(config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the ids that end a text; some models have several."""
    return tokens_named(config, "eos_token_id")


def tokens_named(config: PreTrainedConfig | GenerationConfig | None, name: str) -> tuple[int, ...]:
    """Return the ids in a field such as ``bos_token_id``, which may hold none, one or a list."""
    value = _read(text_config(config) if isinstance(config, PreTrainedConfig) else config, name)
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(int(token) for token in values if isinstance(token, int | float) and not isinstance(token, bool))


def special_tokens(config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the ids that mark the end of a text or of a part of one, each once; only ids of the vocabulary."""
    ids = (*end_tokens(config), *tokens_named(config, "sep_token_id"))
    return tuple(dict.fromkeys(token for token in ids if in_vocabulary(token, config)))


def positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions that the model supports; None if its configuration names no limit."""
    text = text_config(config)
    limit = next((value for name in _POSITIONS if (value := _read(text, name)) is not None), None)
    return limit if isinstance(limit, int) and limit > 0 else None


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens that the model was trained to read at once; None if its configuration does not
    say."""
    return _first_count(text_config(config), _CONTEXT_LENGTHS)


def hidden_size(config: PreTrainedConfig) -> int | None:
    """Return the width of the text model's hidden states; None if its configuration does not say."""
    return _first_count(text_config(config), ("hidden_size", "n_embd", "d_model"))


def attention_heads(config: PreTrainedConfig) -> int | None:
    """Return the number of the text model's query heads; None if its configuration does not say."""
    return _first_count(text_config(config), ("num_attention_heads", "n_head", "num_heads"))


def token_types(config: PreTrainedConfig) -> int | None:
    """Return the number of token types that the model distinguishes; None if its configuration has no such field."""
    return _read(text_config(config), "type_vocab_size")


def image_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Return height and width in pixels; None if the model takes any size or its configuration does not say."""
    size = _read(vision_config(config), "image_size")
    if isinstance(size, dict):
        size = size.get("height"), size.get("width")
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0], size[1]
    return None


def image_channels(config: PreTrainedConfig) -> int | None:
    """Return the number of image channels; None if the configuration does not say, which usually means 3."""
    channels = _read(vision_config(config), "num_channels")
    return channels if isinstance(channels, int) and channels > 0 else None


def class_count(config: PreTrainedConfig) -> int:
    """Return a classifier's number of classes; 0 if the configuration does not say."""
    return _read(config, "num_labels") or 0


def class_names(config: PreTrainedConfig) -> dict[int, str]:
    """Return the names of a classifier's classes, in the order of its outputs."""
    return {int(label): str(name) for label, name in (_read(config, "id2label") or {}).items()}


def problem_type(config: PreTrainedConfig) -> str | None:
    """Return the problem type of a classification head; None if the configuration does not say."""
    return _read(config, "problem_type")


def architecture(config: PreTrainedConfig) -> str | None:
    """Return the name of the model class that the weights were saved from."""
    return next(iter(_read(config, "architectures") or ()), None)


def settle_architectures(config: PreTrainedConfig) -> None:
    """Replace a missing list of model classes by an empty one, in place. transformers searches the list if a family has
    several classes for one task (DeiT)."""
    if _read(config, "architectures") is None:
        config.architectures = []


def code_references(config: PreTrainedConfig) -> Mapping[str, Any]:
    """Map automatic classes (``AutoModel``) to the classes that come as code with the model."""
    return _read(config, "auto_map") or {}


def compression(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return how the weights are quantised or factored; None for ordinary weights."""
    entry = _read(config, "quantization_config")
    return entry if entry is None or isinstance(entry, dict) else dict(vars(entry))


def expert_counts(config: PreTrainedConfig) -> frozenset[int]:
    """Return the numbers of experts that a mixture's routers choose from; empty if the configuration does not say."""
    counts = (_read(part, name) for part in (config, text_config(config)) for name in _EXPERT_COUNTS)
    return frozenset(count for count in counts if isinstance(count, int))


def ties_embeddings(config: PreTrainedConfig) -> bool:
    """Whether the output layer uses the embedding table as its weight."""
    return bool(_read(text_config(config), "tie_word_embeddings"))


def untie_embeddings(config: PreTrainedConfig) -> None:
    """State in the configuration, in place, that the output layer and the embedding table are two weights."""
    for part in (config, text_config(config)):
        part.tie_word_embeddings = False


@contextmanager
def restored_ties(config: PreTrainedConfig) -> Iterator[None]:
    """Restore what the configuration says about tied embeddings at the end of the block."""
    parts = (config, text_config(config))
    before = [(part, part.tie_word_embeddings) for part in parts if _read(part, "tie_word_embeddings") is not None]
    try:
        yield
    finally:
        for part, tied in before:
            part.tie_word_embeddings = tied


def has_encoder_and_decoder(config: PreTrainedConfig) -> bool:
    """Whether the model has an encoder and a decoder."""
    return bool(_read(config, "is_encoder_decoder"))


def attention_of(config: PreTrainedConfig) -> str | None:
    """Return the requested attention implementation, set by the configuration's file or by code."""
    return _read(config, "_attn_implementation")


def forget_kernels(config: PreTrainedConfig) -> str | None:
    """Let transformers choose how attention and experts are computed, if a configuration requests kernels that not
    every machine has; in all nested configurations and in place.

    Returns:
        The first requested kernel that is not PyTorch's own code; None if there is none.
    """
    forgotten = []
    for part in nested_configs(config):
        attention, experts = _read(part, "_attn_implementation"), _read(part, "_experts_implementation")
        if attention not in (None, "eager"):  # families without sdpa refuse it when it is requested by name
            part._attn_implementation_internal = None
            forgotten += [attention] if attention != "sdpa" else []
        if experts not in (None, "eager", "batched_mm", "grouped_mm"):
            part._experts_implementation_internal = None
            forgotten.append(experts)
    return next(iter(forgotten), None)


def shorten(config: PreTrainedConfig, block_indices: Mapping[int, Sequence[int]]) -> None:
    """Give a model fewer blocks, in place, by changing all fields that count blocks or list an entry per block.

    Args:
        block_indices: for each number of blocks, the indices of the blocks to keep.
    """
    counts = {count: len(indices) for count, indices in block_indices.items()}
    for part in nested_configs(config):
        for name, value in list(vars(part).items()):
            if isinstance(value, int) and _COUNTS_BLOCKS.search(name) and not _COUNTS_SOME_BLOCKS.search(name):
                setattr(part, name, counts.get(value, value))
            elif isinstance(value, (list, tuple)) and len(value) in block_indices:
                setattr(part, name, type(value)(value[index] for index in block_indices[len(value)]))
            elif isinstance(value, (list, tuple)) and _COUNTS_BLOCKS.search(name):
                setattr(part, name, type(value)(counts.get(n, n) if isinstance(n, int) else n for n in value))


@contextmanager
def without_cache(config: PreTrainedConfig) -> Iterator[None]:
    """Turn the cache off in all parts of the model within the block, except for calls that request it."""
    before = [(part, part.use_cache) for part in nested_configs(config) if _read(part, "use_cache") is not None]
    for part, _ in before:
        part.use_cache = False
    try:
        yield
    finally:
        for part, value in before:
            part.use_cache = value


def _first_count(config: PreTrainedConfig, names: Sequence[str]) -> int | None:
    """The first of these fields that is a positive number."""
    values = (_read(config, name) for name in names)
    return next((int(value) for value in values if isinstance(value, int | float) and value >= 1), None)


def _read(config: PreTrainedConfig | GenerationConfig | None, name: str) -> Any:
    """A field's value; None if the family does not have the field, or has one value per layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # raised by transformers for a field that differs from layer to layer
        return None
