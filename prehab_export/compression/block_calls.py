"""Stores the arguments of a block's call, so that the block can be called again and again."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from prehab_export.compression.blocks import NotAChain

# Arguments that can be passed again without a copy.
_NUMBERS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
CONSTANTS = (*_NUMBERS, nn.Module, type, FunctionType, MethodType)


@dataclass(frozen=True)
class Link:
    """A reference to a tensor in an earlier block's output, by its index among the leaves of that output."""

    block: str
    index: int


@dataclass(frozen=True)
class Call:
    """The arguments of a block's call, without its hidden states.

    Among the arguments and inside tuples, a `Link` stands for a tensor that an earlier block returned.

    name: keyword under which the block gets its hidden states; None if they are the first positional argument.
    mutable: whether the arguments include an object that the block may write to.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    name: str | None = None
    mutable: bool = False

    def separate(self, memo: dict[int, Any]) -> "Call":
        """Return the same call with its own copies of all objects that the block may write to.

        Args:
            memo: copies made so far, as in ``copy.deepcopy``.
        """
        if not self.mutable:
            return self
        args, kwargs = map_arguments(lambda value: copy_argument(value, memo), (self.args, dict(self.kwargs)))
        return Call(args, kwargs, self.name, True)

    def run(self, block: nn.Module, hidden: Tensor, carried: Mapping[Link, Tensor]) -> Any:
        """Call the block and return its output; ``carried`` holds the tensors that links refer to."""
        args, kwargs = map_arguments(
            lambda value: carried[value] if isinstance(value, Link) else value, (self.args, dict(self.kwargs))
        )
        return block(hidden, *args, **kwargs) if self.name is None else block(*args, **{self.name: hidden}, **kwargs)

    @property
    def links(self) -> list[Link]:
        """All links among the arguments."""
        return [value for value in flatten_arguments((self.args, dict(self.kwargs))) if isinstance(value, Link)]


def map_arguments(action: Callable[[Any], Any], value: Any, depth: int = 0) -> Any:
    """Apply ``action`` to every positional and keyword argument, also inside tuples."""
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        parts = [map_arguments(action, part, depth + 1) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict) and depth == 1:
        return {key: map_arguments(action, part, depth + 1) for key, part in value.items()}
    return action(value)


def copy_argument(value: Any, memo: dict[int, Any]) -> Any:
    """Deep-copy an argument, unless a block can be given the same object again.

    Raises:
        NotAChain: the object cannot be copied.
    """
    if isinstance(value, (Tensor, Link, *CONSTANTS)):
        return value
    try:
        return copy.deepcopy(value, memo)
    except (TypeError, RuntimeError) as error:
        raise NotAChain(f"blocks are given a {type(value).__name__}, which cannot be copied ({error})") from error


def flatten_arguments(arguments: Any, depth: int = 0) -> list[Any]:
    """List the values that `map_arguments` applies its action to."""
    if isinstance(arguments, tuple) and not isinstance(arguments, torch.Size):
        return [value for part in arguments for value in flatten_arguments(part, depth + 1)]
    if isinstance(arguments, dict) and depth == 1:
        return [value for part in arguments.values() for value in flatten_arguments(part, depth + 1)]
    return [arguments]
