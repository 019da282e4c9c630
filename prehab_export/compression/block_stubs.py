"""Runs what lies around a model's blocks without the blocks: what they are called with, and what follows the last."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass(frozen=True)
class OutputForm:
    """What a block returns around its hidden states.

    leaves: the leaves of the output, with None for the hidden states.
    place: the index of the hidden states among the leaves.
    """

    leaves: tuple[Any, ...]
    place: int
    tree: TreeSpec

    @classmethod
    def of(cls, output: Any) -> "OutputForm | None":
        """Return the form of a block's output; None if it holds no tensor or several, which depend on one another."""
        leaves, tree = tree_flatten(output)
        places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if len(places) != 1:
            return None
        return cls(tuple(None if index in places else leaf for index, leaf in enumerate(leaves)), places[0], tree)

    def around(self, hidden: Tensor) -> Any:
        """Return the output of a block that returns these hidden states."""
        leaves = [hidden if index == self.place else leaf for index, leaf in enumerate(self.leaves)]
        return tree_unflatten(leaves, self.tree)


@dataclass(frozen=True)
class BlockStubs:
    """Stand-ins for the blocks of a model, each of which returns the hidden states that it is given.

    forms: block → the form of its output, in the order in which they run.
    keywords: block → the keyword under which it gets its hidden states; None if it is the first argument.
    """

    forms: Mapping[str, OutputForm]
    keywords: Mapping[str, str | None]

    @contextmanager
    def standing_in(self, model: nn.Module, final: Tensor | None = None) -> Iterator[None]:
        """Replace the blocks of the model within the context; the last one returns ``final`` if that is given."""
        last = list(self.forms)[-1]
        blocks = {name: model.get_submodule(name) for name in self.forms}
        own = {name: vars(block)["forward"] for name, block in blocks.items() if "forward" in vars(block)}
        try:
            for name, block in blocks.items():
                block.forward = self._stub(name, final if name == last else None)
            yield
        finally:
            for name, block in blocks.items():
                if name in own:
                    block.forward = own[name]
                else:
                    vars(block).pop("forward", None)

    def _stub(self, name: str, final: Tensor | None) -> Callable:
        form, keyword = self.forms[name], self.keywords[name]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if keyword is None else kwargs[keyword]
            return form.around(hidden if final is None else final)

        return forward
