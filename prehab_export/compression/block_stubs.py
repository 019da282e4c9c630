"""Runs what lies around a model's blocks without the blocks: what they are called with, and what follows the last."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from prehab_export.compression.replaced_forwards import replaced_forwards


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

    def standing_in(self, model: nn.Module, final: Tensor | None = None) -> AbstractContextManager[None]:
        """Replace the blocks of the model within the context; the last one returns ``final`` if that is given."""
        last = list(self.forms)[-1]
        return replaced_forwards(
            {model.get_submodule(name): self._stub(name, final if name == last else None) for name in self.forms}
        )

    def _stub(self, name: str, final: Tensor | None) -> Callable:
        form, keyword = self.forms[name], self.keywords[name]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if keyword is None else kwargs[keyword]
            return form.around(hidden if final is None else final)

        return forward
