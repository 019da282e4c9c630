"""Make rotary frequencies that depend on the length of a text traceable, with plain tensor operations.

Dynamic NTK scaling (``rope_type: dynamic``) stretches the wavelengths once a text is longer than those that the model
was trained on. transformers recomputes the frequencies when the text grows and stores them in the module, with branches
that cannot be traced. While a model is traced here, they are computed in every step from the positions of that step.
This gives the same numbers for a prompt, and for a text that grows step by step.
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
    """Let modules with dynamic frequencies compute them without branches within the block; the modules are restored at
    the end."""
    with ExitStack() as stack:
        for module in model.modules():
            if any("dynamic" in kind for kind in _kinds(module).values()) and _undecorated(module) is not None:
                # An attribute of the instance hides the method of its class.
                vars(module)["forward"] = partial(_rotate, module)
                stack.callback(vars(module).pop, "forward")
        yield


def _rotate(module: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
    """Compute cosines and sines for these positions, by the module's own code with the frequencies for this length."""
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
    """The kind of frequencies by layer type; under None if all layers have the same."""
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, str):
        return {None: kind}
    return dict(kind) if isinstance(kind, dict) else {}


def _undecorated(module: nn.Module) -> Any:
    """The forward method without the decorators by which transformers updates frequencies; None if it has none."""
    forward: Any = type(module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return None if forward is type(module).forward else forward
