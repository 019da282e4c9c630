"""What a block is called with, kept so that it can be called again and again."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from prehab_export.compression.blocks import NotAChain

# What a block can be given again as it is.
_NUMBERS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
CONSTANTS = (*_NUMBERS, nn.Module, type, FunctionType, MethodType)


@dataclass(frozen=True)
class Link:
    """A tensor of an earlier block's output: the one at this place of its leaves."""

    block: str
    at: int


@dataclass(frozen=True)
class Call:
    """What a block is called with besides its hidden states, which come first or under ``name``. Among positional and
    keyword arguments and inside tuples, a `Link` stands for what comes from an earlier block.

    lasting: whether it holds something that the block may write to.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    name: str | None = None
    lasting: bool = False

    def separate(self, memo: dict[int, Any]) -> "Call":
        """The same with its own copy of whatever the block may write to. ``memo``: of copies that were made already."""
        if not self.lasting:
            return self
        args, kwargs = map_arguments(lambda value: copied(value, memo), (self.args, dict(self.kwargs)))
        return Call(args, kwargs, self.name, True)

    def made(self, block: nn.Module, hidden: Tensor, carried: Mapping[Link, Tensor]) -> Any:
        """What the block returns."""
        args, kwargs = map_arguments(
            lambda value: carried[value] if isinstance(value, Link) else value, (self.args, dict(self.kwargs))
        )
        return block(hidden, *args, **kwargs) if self.name is None else block(*args, **{self.name: hidden}, **kwargs)

    @property
    def links(self) -> list[Link]:
        return [value for value in flat((self.args, dict(self.kwargs))) if isinstance(value, Link)]


def map_arguments(action: Callable[[Any], Any], value: Any, depth: int = 0) -> Any:
    """``action`` on what stands in positional and keyword arguments, and in tuples among them."""
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        parts = [map_arguments(action, part, depth + 1) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict) and depth == 1:
        return {key: map_arguments(action, part, depth + 1) for key, part in value.items()}
    return action(value)


def copied(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, (Tensor, Link, *CONSTANTS)):
        return value
    try:
        return copy.deepcopy(value, memo)
    except (TypeError, RuntimeError) as error:
        raise NotAChain(f"blocks are given a {type(value).__name__}, which cannot be copied ({error})") from error


def flat(arguments: Any, depth: int = 0) -> list[Any]:
    """What `map_arguments` acts on."""
    if isinstance(arguments, tuple) and not isinstance(arguments, torch.Size):
        return [value for part in arguments for value in flat(part, depth + 1)]
    if isinstance(arguments, dict) and depth == 1:
        return [value for part in arguments.values() for value in flat(part, depth + 1)]
    return [arguments]
