"""Lets a model compute in float32 although its weights are stored in half precision.

A large model is held as it is stored: in half the memory, and mapped from its file rather than read. The weights of a
block are converted when the block runs and given up right after; those outside the blocks, when the model runs. The
results are those of a model loaded in float32, since every bfloat16 or float16 number is a float32 number too.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_HALF = (torch.bfloat16, torch.float16)
# Attribute of a module whose weights, with those of the modules inside it, are converted together.
_TOGETHER = "_widens_on_use"
# Attribute of such a module while it runs: its tensors as stored.
_STORED = "_tensors_as_stored"


def widen_on_use(model: nn.Module) -> None:
    """Convert weights to float32 while they are used, from now on. A copy of the model does so too."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for module in (model, *(entry for blocks in lists for entry in blocks if not isinstance(entry, nn.ModuleList))):
        if not hasattr(module, _TOGETHER):
            setattr(module, _TOGETHER, True)
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(_restore, always_call=True)
    for module in model.modules():
        if type(module) is nn.Embedding:
            module.register_forward_hook(_widen_output)


def has_half_tables(model: nn.Module) -> bool:
    """Whether the model computed a table in half precision while it was loaded. It then differs from the model loaded
    in float32 by more than its weights are rounded."""
    stored = model.state_dict().keys()
    return any(buffer.dtype in _HALF and name not in stored for name, buffer in model.named_buffers())


def _together(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module and the modules inside it, without those that are converted by themselves."""
    if type(module) is not nn.Embedding:  # of a table, a few rows are converted instead of all
        yield module
    for child in module.children():
        if not hasattr(child, _TOGETHER):
            yield from _together(child)


def _widen(module: nn.Module, _args: Any) -> None:
    stored: list[tuple[dict[str, Any], str, Tensor]] = []
    for part in _together(module):
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.dtype in _HALF:
                    stored.append((tensors, name, tensor))
                    # Assigned past the module's own checks. Autograd keeps what it needs of it.
                    tensors[name] = nn.Parameter(tensor.detach().float(), requires_grad=False)
    vars(module).setdefault(_STORED, []).append(stored)  # a module may run inside itself


def _restore(module: nn.Module, _args: Any, _output: Any) -> None:
    for tensors, name, tensor in vars(module)[_STORED].pop():
        tensors[name] = tensor


def _widen_output(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output.float()
