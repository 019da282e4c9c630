"""The repeated blocks of a model, and what a run of some of their layers showed."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn


class NotAChain(Exception):
    """The model's blocks do not hand their output straight to the next one, once a pass; the text says where."""


@dataclass(frozen=True)
class Block:
    """One entry of the model's list of blocks, and the targeted layers inside it in the model's order."""

    name: str
    layers: tuple[str, ...]


@dataclass
class Seen:
    """What one run of some layers with a common input showed: the input of each, and, for layers whose output is added
    to a residual stream, what it was added to.

    numbers: of every row of the input, which token it is (see ``dataflow.TokenRows``); None where that is not known.
    of_tokens: whether the input was made from tokens at all.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    residuals: dict[str, Tensor] = field(default_factory=dict)
    numbers: Tensor | None = None
    of_tokens: bool = True

    def valid(self, mask: Tensor | None) -> Tensor | None:
        """Which rows of the input count, in its shape without the last; None for all. mask: bool (B, T)."""
        if mask is None or self.numbers is None:
            return None
        return (self.numbers >= 0) & mask.flatten()[self.numbers.long().clamp_min(0)]


def find_blocks(model: nn.Module, layers: Iterable[str]) -> list[Block]:
    """The blocks that hold the named layers; a layer outside every ``nn.ModuleList`` is in none."""
    found: dict[str, list[str]] = {}
    for name in layers:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            entry = ".".join(parts[: depth + 1])
            held = isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList)
            # A list in a list holds the blocks, and is none itself.
            if held and not isinstance(model.get_submodule(entry), nn.ModuleList):
                found.setdefault(entry, []).append(name)
                break
    return [Block(name, tuple(inside)) for name, inside in found.items()]
