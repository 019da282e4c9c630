"""A model of the same make with few blocks and weights of zero, to try on it what would be slow on the whole model.

One block of every kind is kept: blocks are of one kind if they are built of the same classes in the same shapes and
with the same settings. The width stays, for it may be part of what is tried; weights of zero that are only read take
no memory.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from converters.model_config import shorten

# Settings by which blocks of one kind differ: which of them it is, and how often it is skipped in training.
_PLACES = ("idx", "index", "number", "_id", "prob", "rate")
# Above so many bytes of weights nothing is built, although most of them would never be written.
LARGEST = 64 * 10**9


def skeleton(
    config: PreTrainedConfig, whole: nn.Module, build: Callable[[PreTrainedConfig], PreTrainedModel]
) -> PreTrainedModel | None:
    """The model with one block of every kind, in evaluation mode and float32; None where it cannot be made smaller and
    is too large as it is.

    Args:
        whole: the model on the meta device.
        build: makes the model of a configuration.
    """
    places = _first_of_each_kind(whole)
    short = _shortened(config, places)
    if _all_settings(_empty(short, build)) != _all_settings(whole):
        # Where what a block is follows from its place, the ones between are needed too.
        short = _shortened(config, {length: range(kept[-1] + 1) for length, kept in places.items()})
    size = sum(4 * parameter.numel() for parameter in _empty(short, build).parameters())
    if size > LARGEST:
        return None
    with no_init_weights():  # buffers that are computed are computed
        model = build(short)
    model.tie_weights()
    for parameter in model.parameters():
        # Pages that nobody has written to are not there; torch.zeros writes.
        parameter.data = torch.from_numpy(np.zeros(parameter.shape, np.float32))
    return model.float().eval()


def _shortened(config: PreTrainedConfig, kept: Mapping[int, Sequence[int]]) -> PreTrainedConfig:
    short = copy.deepcopy(config)
    shorten(short, kept)
    return short


def _empty(config: PreTrainedConfig, build: Callable[[PreTrainedConfig], PreTrainedModel]) -> PreTrainedModel:
    with torch.device("meta"):
        return build(copy.deepcopy(config)).eval()


def _first_of_each_kind(model: nn.Module) -> dict[int, list[int]]:
    """By the length of a list of blocks, the places of the first block of every kind."""
    found: dict[int, set[int]] = {}
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            kinds = _kinds(list(module))
            found.setdefault(len(module), set()).update(kinds.index(kind) for kind in kinds)
    return {length: sorted(places) for length, places in found.items() if len(places) < length}


def _all_settings(model: nn.Module) -> set[str]:
    """What the parts of a model are, each by itself, wherever they are."""
    return {repr(list(_own_settings(part))) for part in model.modules() if not isinstance(part, PreTrainedModel)}


def _kinds(blocks: list[nn.Module]) -> list[dict[tuple[str, str], Any]]:
    """What each block is made of, but for what only says which of them it is."""
    made = [dict(_settings(block)) for block in blocks]
    places = {key for key in made[0] if all(settings.get(key) == place for place, settings in enumerate(made))}
    return [{key: value for key, value in settings.items() if key not in places} for settings in made]


def _settings(block: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """Classes, shapes and plain settings by the part of the block and their names."""
    for part, module in block.named_modules():
        for name, value in _own_settings(module):
            yield (part, name), value


def _own_settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield "", type(module)
    for name, parameter in module.named_parameters(recurse=False):
        yield name, tuple(parameter.shape)
    for name, value in vars(module).items():
        is_plain = value is None or isinstance(value, (bool, int, str, tuple))
        if is_plain and not name.startswith("_") and not any(word in name for word in _PLACES):
            yield name, value
