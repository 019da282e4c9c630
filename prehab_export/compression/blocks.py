"""Finds the repeated blocks of a model, and defines what is recorded when their layers run."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


class NotAChain(Exception):
    """The blocks do not pass their output straight to the next block, once per forward pass; the text says where."""


@dataclass(frozen=True)
class Block:
    """One entry of the model's list of blocks, and the selected layers inside it, in the model's order."""

    name: str
    layers: tuple[str, ...]


@dataclass
class LayerRun:
    """A record of one run of some layers that read the same input.

    shape: the shape of their input.
    input: the input itself; None if it was not kept.
    residuals: layer → the residual stream that its output was added to, if it was added to one.
    outputs: layer → its output, if it was added to a residual stream.
    numbers: the token number of every row of the input (see ``dataflow.TokenRows``); None if unknown.
    from_tokens: whether the input was computed from tokens at all.
    """

    shape: torch.Size
    input: Tensor | None = None
    residuals: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    numbers: Tensor | None = None
    from_tokens: bool = True

    def valid(self, mask: Tensor | None) -> Tensor | None:
        """Return which rows of the input are real tokens, given the mask (bool, B×T); None means all rows.

        The result is bool, with the shape of the input without its last dimension.
        """
        if mask is None or self.numbers is None:
            return None
        return (self.numbers >= 0) & mask.flatten()[self.numbers.long().clamp_min(0)]


def find_blocks(model: nn.Module, layers: Iterable[str]) -> list[Block]:
    """Return the blocks that hold the named layers; a layer outside every ``nn.ModuleList`` is in none."""
    contents: dict[str, list[str]] = {}
    for name in layers:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            entry = ".".join(parts[: depth + 1])
            in_list = isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList)
            # A list inside a list holds blocks, but is not a block itself.
            if in_list and not isinstance(model.get_submodule(entry), nn.ModuleList):
                contents.setdefault(entry, []).append(name)
                break
    return [Block(name, tuple(inside)) for name, inside in contents.items()]
