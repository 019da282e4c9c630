"""Rotary frequencies that depend on how long a text is, as plain tensor operations.

Dynamic NTK scaling (``rope_type: dynamic``) stretches the wavelengths once a text is longer than the model was trained
for. transformers computes the frequencies anew when the text grows and keeps them in the module, by branches that
cannot be traced. While a model is traced they are computed in every step from the step's own positions: the same
numbers for a prompt, and for a text that grows by one step after another.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@contextmanager
def traceable_frequencies(model: nn.Module) -> Iterator[None]:
    """Within it, modules with dynamic frequencies compute them without branches; none is changed for good."""
    with ExitStack() as stack:
        for module in model.modules():
            if any("dynamic" in kind for kind in _kinds(module).values()) and _undecorated(module) is not None:
                # An attribute of the instance hides the method of its class.
                vars(module)["forward"] = partial(_rotate, module)
                stack.callback(vars(module).pop, "forward")
        yield


def _rotate(module: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
    """Cosines and sines for these positions, by the module's own code on its frequencies for this length."""
    options = {} if layer_type is None else {"layer_type": layer_type}
    kind = _kinds(module)[layer_type]
    forward: Any = _undecorated(module)
    if "dynamic" not in kind:
        return type(module).forward(module, x, position_ids, **options)
    prefix = "" if layer_type is None else f"{layer_type}_"
    trained = getattr(module, f"{prefix}original_inv_freq").to(x.device)
    length = position_ids.max() + 1
    stretched, _ = ROPE_INIT_FUNCTIONS[kind](module.config, x.device, seq_len=length, **options)
    stand_in = copy.copy(module)
    frequencies = torch.where(length > vars(module)["original_max_seq_len"], stretched, trained)
    stand_in._buffers = {**module._buffers, f"{prefix}inv_freq": frequencies}
    return forward(stand_in, x, position_ids, **options)


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """The kind of frequencies by type of layer, or under None where all layers have one."""
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, str):
        return {None: kind}
    return dict(kind) if isinstance(kind, dict) else {}


def _undecorated(module: nn.Module) -> Any:
    """The forward pass without transformers' updates around it; None where there are none."""
    forward: Any = type(module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return None if forward is type(module).forward else forward
