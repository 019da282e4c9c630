"""What a model's configuration says, whatever its family calls it, and where its family has no such field.

Families differ in their fields: MobileBERT has no end token, convolutional networks have no vocabulary, and the fields
of a model of several modalities lie in nested configurations. Every other module asks here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

# What a model of images takes where it takes any size.
USUAL_IMAGE_SIZE = (224, 224)
# Fields that tell how many experts a router chooses among.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Where a configuration without an attribute map tells how many positions there are.
_POSITIONS = ("max_position_embeddings", "max_seq_len")
# Where one tells how long the texts were that the model was trained on, whether or not positions end there.
_CONTEXT_LENGTHS = (*_POSITIONS, "n_positions", "max_sequence_length", "seq_length", "n_ctx")
# Names of fields that count blocks (num_hidden_layers, n_layer, depths, block_sizes), and of those that count a part.
_COUNTS_BLOCKS = re.compile(r"(^|_)(layers?|blocks?|depths?|block_sizes|num_block_repeats)$")
_IS_PART_OF_COUNT = re.compile(r"shared|dense|mtp|nextn|predict|skip|group|window")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part that describes the text model; the whole, where there is but one."""
    try:
        return config.get_text_config()
    except ValueError:  # one for the encoder and another for the decoder
        return config.get_text_config(decoder=True)


def vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part that describes the vision model; the whole, where there is but one."""
    nested = _read(config, "vision_config")
    return nested if isinstance(nested, PreTrainedConfig) else config


def nested_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The configuration and all that are nested in it, outermost first."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from nested_configs(value)


def vocabulary_size(config: PreTrainedConfig) -> int | None:
    """How many token ids there are; None for a model without an embedding table of tokens."""
    size = _read(text_config(config), "vocab_size")
    return size if isinstance(size, int) and size > 0 else None


def in_vocabulary(token: int | None, config: PreTrainedConfig) -> bool:
    """Configurations keep ids of other vocabularies by default (GPT-2: 50256), or −1 for none."""
    size = vocabulary_size(config)
    return token is not None and token >= 0 and (size is None or token < size)


def padding_token(config: PreTrainedConfig) -> int | None:
    """The id that the configuration names, whether or not it is in the vocabulary."""
    return next(iter(tokens_named(config, "pad_token_id")), None)


def end_tokens(config: PreTrainedConfig) -> tuple[int, ...]:
    """Ids that end a text, of which some models have several."""
    return tokens_named(config, "eos_token_id")


def tokens_named(config: PreTrainedConfig | GenerationConfig | None, name: str) -> tuple[int, ...]:
    """The ids in a field of this kind (``bos_token_id``), of which there may be none, one or a list."""
    value = _read(text_config(config) if isinstance(config, PreTrainedConfig) else config, name)
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(int(token) for token in values if isinstance(token, int | float) and not isinstance(token, bool))


def special_tokens(config: PreTrainedConfig) -> tuple[int, ...]:
    """Ids of the vocabulary that mark the end of a text or of a part of one, each once."""
    named = (*end_tokens(config), *tokens_named(config, "sep_token_id"))
    return tuple(dict.fromkeys(token for token in named if in_vocabulary(token, config)))


def positions(config: PreTrainedConfig) -> int | None:
    """How many positions the model was made for; None where its configuration names no bound."""
    text = text_config(config)
    limit = next((value for name in _POSITIONS if (value := _read(text, name)) is not None), None)
    return limit if isinstance(limit, int) and limit > 0 else None


def context_length(config: PreTrainedConfig) -> int | None:
    """How many tokens the model was trained to read at once; None where its configuration does not say."""
    return _first_count(text_config(config), _CONTEXT_LENGTHS)


def hidden_size(config: PreTrainedConfig) -> int | None:
    """Width of the hidden states of the text model; None where its configuration does not say."""
    return _first_count(text_config(config), ("hidden_size", "n_embd", "d_model"))


def attention_heads(config: PreTrainedConfig) -> int | None:
    """Heads of queries of the text model; None where its configuration does not say."""
    return _first_count(text_config(config), ("num_attention_heads", "n_head", "num_heads"))


def token_types(config: PreTrainedConfig) -> int | None:
    """How many kinds of tokens the model tells apart; None where its configuration has no such field."""
    return _read(text_config(config), "type_vocab_size")


def image_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Height and width in pixels; None where the model takes any size or its configuration does not say."""
    size = _read(vision_config(config), "image_size")
    if isinstance(size, dict):
        size = size.get("height"), size.get("width")
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0], size[1]
    return None


def image_channels(config: PreTrainedConfig) -> int | None:
    """Channels of an image; None where the configuration does not say, which mostly means 3."""
    channels = _read(vision_config(config), "num_channels")
    return channels if isinstance(channels, int) and channels > 0 else None


def class_count(config: PreTrainedConfig) -> int:
    """How many classes a classifier tells apart; 0 where the configuration does not say."""
    return _read(config, "num_labels") or 0


def class_names(config: PreTrainedConfig) -> dict[int, str]:
    """Names of a classifier's classes, in the order of its outputs."""
    return {int(label): str(name) for label, name in (_read(config, "id2label") or {}).items()}


def problem_type(config: PreTrainedConfig) -> str | None:
    """What a classification head solves, where the configuration says it."""
    return _read(config, "problem_type")


def architecture(config: PreTrainedConfig) -> str | None:
    """Name of the class that the weights were saved from."""
    return next(iter(_read(config, "architectures") or ()), None)


def settle_architectures(config: PreTrainedConfig) -> None:
    """No list of classes becomes an empty one, in place: transformers looks through it where a family has several
    classes for one task (DeiT)."""
    if _read(config, "architectures") is None:
        config.architectures = []


def code_references(config: PreTrainedConfig) -> Mapping[str, Any]:
    """Classes that come as code with the model, by the automatic class that stands for them."""
    return _read(config, "auto_map") or {}


def compression(config: PreTrainedConfig) -> dict[str, Any] | None:
    """How the weights are quantised or factored; None for ordinary ones."""
    entry = _read(config, "quantization_config")
    return entry if entry is None or isinstance(entry, dict) else dict(vars(entry))


def expert_counts(config: PreTrainedConfig) -> frozenset[int]:
    """How many experts the routers of a mixture choose among; empty where the configuration does not say."""
    found = (_read(part, name) for part in (config, text_config(config)) for name in _EXPERT_COUNTS)
    return frozenset(count for count in found if isinstance(count, int))


def ties_embeddings(config: PreTrainedConfig) -> bool:
    """Whether the head is to be the table of embeddings."""
    return bool(_read(text_config(config), "tie_word_embeddings"))


def untie_embeddings(config: PreTrainedConfig) -> None:
    """Say, in place, that head and table of embeddings are two weights."""
    for part in (config, text_config(config)):
        part.tie_word_embeddings = False


@contextmanager
def ties_as_they_are(config: PreTrainedConfig) -> Iterator[None]:
    """Whatever happens within, the configuration says of ties what it said before."""
    parts = (config, text_config(config))
    before = [(part, part.tie_word_embeddings) for part in parts if _read(part, "tie_word_embeddings") is not None]
    try:
        yield
    finally:
        for part, tied in before:
            part.tie_word_embeddings = tied


def has_encoder_and_decoder(config: PreTrainedConfig) -> bool:
    """Whether a decoder reads what an encoder made."""
    return bool(_read(config, "is_encoder_decoder"))


def attention_of(config: PreTrainedConfig) -> str | None:
    """The implementation of attention that was asked for, by the configuration's file or by code."""
    return _read(config, "_attn_implementation")


def forget_kernels(config: PreTrainedConfig) -> str | None:
    """Leave it to transformers how attention and experts are computed where the configuration asks for kernels that not
    every machine has, here and in all nested configurations, in place.

    Returns:
        What was asked for, where that is more than a choice of PyTorch's own code.
    """
    forgotten = []
    for part in nested_configs(config):
        attention, experts = _read(part, "_attn_implementation"), _read(part, "_experts_implementation")
        if attention not in (None, "eager"):  # a family without it refuses sdpa by that name
            part._attn_implementation_internal = None
            forgotten += [attention] if attention != "sdpa" else []
        if experts not in (None, "eager", "batched_mm", "grouped_mm"):
            part._experts_implementation_internal = None
            forgotten.append(experts)
    return next(iter(forgotten), None)


def shorten(config: PreTrainedConfig, kept: Mapping[int, Sequence[int]]) -> None:
    """Give a model fewer blocks, in place: wherever the configuration counts blocks, or has a list with an entry for
    each of them. ``kept`` tells for a number of blocks which of them are to be left."""
    counts = {count: len(places) for count, places in kept.items()}
    for part in nested_configs(config):
        for name, value in list(vars(part).items()):
            if isinstance(value, int) and _COUNTS_BLOCKS.search(name) and not _IS_PART_OF_COUNT.search(name):
                setattr(part, name, counts.get(value, value))
            elif isinstance(value, (list, tuple)) and len(value) in kept:
                setattr(part, name, type(value)(value[place] for place in kept[len(value)]))
            elif isinstance(value, (list, tuple)) and _COUNTS_BLOCKS.search(name):
                setattr(part, name, type(value)(counts.get(n, n) if isinstance(n, int) else n for n in value))


@contextmanager
def without_cache(config: PreTrainedConfig) -> Iterator[None]:
    """No cache but the one that a call asks for, in no part of the model."""
    before = [(part, part.use_cache) for part in nested_configs(config) if _read(part, "use_cache") is not None]
    for part, _ in before:
        part.use_cache = False
    try:
        yield
    finally:
        for part, value in before:
            part.use_cache = value


def _first_count(config: PreTrainedConfig, names: Sequence[str]) -> int | None:
    """The first of the fields that is a positive number."""
    values = (_read(config, name) for name in names)
    return next((int(value) for value in values if isinstance(value, int | float) and value >= 1), None)


def _read(config: PreTrainedConfig | GenerationConfig | None, name: str) -> Any:
    """The field; None where the family has none, or has another in every layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # raised by transformers for a field that differs from layer to layer
        return None
