"""Build a small copy of a model, with few blocks and zero weights, for tests that would be slow on the whole model.

The copy has one block of every kind. Two blocks are of the same kind if they consist of the same classes with the same
shapes and settings. The width does not change, because it may matter to the test. Zero weights that are only read take
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

# Parts of the names of settings by which blocks of one kind may differ: the index, and the rate of skips in training.
_INDEX_WORDS = ("idx", "index", "number", "_id", "prob", "rate")
# Nothing is built with more bytes of weights than this, although most of the memory would never be written.
LARGEST = 64 * 10**9


def skeleton(
    config: PreTrainedConfig, meta_model: nn.Module, build: Callable[[PreTrainedConfig], PreTrainedModel]
) -> PreTrainedModel | None:
    """Return the model with one block of every kind, in evaluation mode and float32; None if it is too large even so.

    Args:
        meta_model: the whole model on the meta device.
        build: builds the model of a configuration.
    """
    block_indices = _first_of_each_kind(meta_model)
    short_config = _shortened(config, block_indices)
    if _all_settings(_empty(short_config, build)) != _all_settings(meta_model):
        # If the kind of a block depends on its index, the blocks in between are needed too.
        short_config = _shortened(config, {length: range(indices[-1] + 1) for length, indices in block_indices.items()})
    size = sum(4 * parameter.numel() for parameter in _empty(short_config, build).parameters())
    if size > LARGEST:
        return None
    with no_init_weights():  # computed buffers are still computed
        model = build(short_config)
    model.tie_weights()
    for parameter in model.parameters():
        # Memory pages that were never written take no memory; torch.zeros would write them.
        parameter.data = torch.from_numpy(np.zeros(parameter.shape, np.float32))
    return model.float().eval()


def _shortened(config: PreTrainedConfig, block_indices: Mapping[int, Sequence[int]]) -> PreTrainedConfig:
    short_config = copy.deepcopy(config)
    shorten(short_config, block_indices)
    return short_config


def _empty(config: PreTrainedConfig, build: Callable[[PreTrainedConfig], PreTrainedModel]) -> PreTrainedModel:
    """The model on the meta device, without weights."""
    with torch.device("meta"):
        return build(copy.deepcopy(config)).eval()


def _first_of_each_kind(model: nn.Module) -> dict[int, list[int]]:
    """Map the length of a list of blocks to the indices of the first block of every kind."""
    block_indices: dict[int, set[int]] = {}
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            kinds = _kinds(list(module))
            block_indices.setdefault(len(module), set()).update(kinds.index(kind) for kind in kinds)
    return {length: sorted(indices) for length, indices in block_indices.items() if len(indices) < length}


def _all_settings(model: nn.Module) -> set[str]:
    """The settings of each part of a model, regardless of its place in the model."""
    return {repr(list(_own_settings(part))) for part in model.modules() if not isinstance(part, PreTrainedModel)}


def _kinds(blocks: list[nn.Module]) -> list[dict[tuple[str, str], Any]]:
    """The settings of each block, without those that only state its index."""
    all_settings = [dict(_settings(block)) for block in blocks]
    index_keys = {
        key for key in all_settings[0] if all(settings.get(key) == index for index, settings in enumerate(all_settings))
    }
    return [{key: value for key, value in settings.items() if key not in index_keys} for settings in all_settings]


def _settings(block: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """Classes, shapes and plain settings, by the part of the block and their own name."""
    for part, module in block.named_modules():
        for name, value in _own_settings(module):
            yield (part, name), value


def _own_settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The class, shapes and plain settings of a module itself, without its children."""
    yield "", type(module)
    for name, parameter in module.named_parameters(recurse=False):
        yield name, tuple(parameter.shape)
    for name, value in vars(module).items():
        is_plain = value is None or isinstance(value, (bool, int, str, tuple))
        if is_plain and not name.startswith("_") and not any(word in name for word in _INDEX_WORDS):
            yield name, value
