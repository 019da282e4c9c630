"""Keeps the outputs of modules whose layers all have their final weights, so that they do not run again.

While a block is fitted it runs once for each input of its layers. What lies before the layers that are being fitted, an
attention above all, gives the same in every one of these runs.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from prehab_export.compression.dataflow import TokenRows
from prehab_export.compression.replaced_forwards import replaced_forwards
from prehab_export.compression.spool import Spool, Spooled


@dataclass(frozen=True)
class _Output:
    """An output: its leaves, tensors among them in the spool, and the token numbers of these."""

    leaves: list[Any]
    numbers: list[Tensor | None]
    tree: TreeSpec

    @classmethod
    def of(cls, output: Any, rows: TokenRows, spool: Spool) -> "_Output":
        leaves, tree = tree_flatten(output)
        numbers = [rows.numbers(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        return cls([spool.keep(leaf.clone()) if isinstance(leaf, Tensor) else leaf for leaf in leaves], numbers, tree)

    def load(self, rows: TokenRows) -> Any:
        """Return the output as it was; the rows of its tensors are tracked again."""
        leaves = []
        for leaf, numbers in zip(self.leaves, self.numbers, strict=True):
            if isinstance(leaf, Spooled):
                leaf = leaf.load().clone()
                if numbers is None:
                    rows.mark(leaf)
                else:
                    rows.number(leaf, numbers)
            leaves.append(leaf)
        return tree_unflatten(leaves, self.tree)


class FinishedModules:
    """The finished modules of one block of a model.

    spool: holds their outputs.
    """

    def __init__(self, model: nn.Module, spool: Spool) -> None:
        self.model, self.spool = model, spool
        self._names: list[str] = []
        self._outputs: dict[tuple[str, int], _Output] = {}

    def clear(self) -> None:
        """Forget all modules and outputs: another block begins, or weights have changed."""
        self._names, self._outputs = [], {}

    def update(self, block: str, layers: Collection[str], finished: Collection[str]) -> None:
        """Find the modules inside the block all of whose layers are finished.

        Args:
            layers: names of all layers of the block that get new weights.
            finished: those that have them.
        """
        names = list(_finished(block, self.model.get_submodule(block), layers, finished))
        self._outputs = {key: output for key, output in self._outputs.items() if key[0] in names}
        self._names = names

    def standing_in(self, number: int, rows: TokenRows) -> AbstractContextManager[None]:
        """Within the context, finished modules give the output that they gave before for this batch.

        One that has not run for this batch yet runs, and its output is kept.
        """
        modules = {name: self.model.get_submodule(name) for name in self._names}
        return replaced_forwards(
            {module: self._stand_in(name, number, rows, module.forward) for name, module in modules.items()}
        )

    def _stand_in(self, name: str, number: int, rows: TokenRows, run: Callable) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if (name, number) in self._outputs:
                return self._outputs[name, number].load(rows)
            output = run(*args, **kwargs)
            self._outputs[name, number] = _Output.of(output, rows, self.spool)
            return output

        return forward


def _finished(name: str, module: nn.Module, layers: Collection[str], finished: Collection[str]) -> Iterator[str]:
    """Yield the largest modules inside a module that hold such layers, and finished ones only.

    Single layers are left out: they cost little beside what their outputs take.
    """
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}"
        inside = [layer for layer in layers if layer.startswith(path + ".")]
        if not inside:
            continue
        if set(inside) <= set(finished) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield path
        else:
            yield from _finished(path, child, layers, finished)
