"""Shares out the parameters of a model in training over processes, block by block: FSDP2, PyTorch's ``fully_shard``.

Gradients and the optimiser's state take three times the memory of the weights. Each process holds a slice of all three,
and a block's weights are whole only while the block runs. Whatever needs a whole matrix (a rank surrogate, a basis)
gathers one at a time.

accelerate's own FSDP2 wraps the same function, but does not apply it on CPUs, where this is tested, and it has no way
back to an ordinary model. So the model itself stays as it is: a copy of it is sliced and trained, and the results are
written back.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from prehab_export.compression.blocks import find_blocks
from prehab_export.inputs import device_of
from prehab_export.linalg import gathered, sliced
from prehab_export.system import Team


class ShardedCopy:
    """A copy of a model whose parameters are shared out over the processes of a team.

    model: the copy; it is called like the model itself.
    parameters: the sliced parameters that stand for those of the model to train, in the same order.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], team: Team, memo: dict[int, object]
    ) -> None:
        """
        Args:
            parameters: the model's parameters to train.
            memo: what ``copy.deepcopy`` must not copy by itself.
        """
        self.model = copy.deepcopy(model, memo).eval()
        mesh = init_device_mesh(device_of(model).type, (team.size,))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for block in find_blocks(self.model, [name.rpartition(".")[0] for name in names.values()]):
            fully_shard(self.model.get_submodule(block.name), mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # Losses are shares of one loss, so gradients add up, and are not averaged.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self._whole = list(parameters)
        self.parameters = [self.model.get_parameter(names[id(parameter)]) for parameter in parameters]

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the model itself the weights of the copy, gathering one parameter at a time."""
        for whole, part in zip(self._whole, self.parameters, strict=True):
            whole.copy_(gathered(part))

    @torch.no_grad()
    def take_over(self) -> None:
        """Give the copy the weights of the model itself, and add the model's gradients to those of the copy."""
        for whole, part in zip(self._whole, self.parameters, strict=True):
            part.copy_(sliced(whole, part))
            if whole.grad is not None:
                gradient = sliced(whole.grad, part)
                part.grad = gradient if part.grad is None else part.grad + gradient
                whole.grad = None
