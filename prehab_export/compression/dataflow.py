"""Tracks where a tensor comes from: whether it was computed from certain others, and which token each row belongs to.

Counting rows does not identify tokens. An expert sees only some of them, in an order of its own; a table of relative
positions may happen to have as many rows as the batch has tokens; some models put tokens before samples. Therefore the
operations themselves are watched while the model runs.

*Marks* belong to memory: whatever is computed from a marked tensor, or written from one, is marked. *Token numbers*
move with the data: an operation that moves rows (views, indexing, concatenation) moves their numbers in the same way,
and one that works row by row (linear layers, norms, softmax, attention's queries) passes them on. The result of any
other operation has no numbers, until it is added to a tensor of the same shape that has some.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Product → index of the argument whose rows become the rows of the result.
_LEFT_OPERAND = {aten.mm: 0, aten.bmm: 0, aten.linear: 0, aten.addmm: 1, aten.baddbmm: 1, aten.mv: 0}
_RESHAPES = {aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias}
# Operations that move the entries of their first argument without changing any.
_MOVES = {
    aten.alias,
    aten.chunk,
    aten.diagonal,
    aten.expand,
    aten.flip,
    aten.gather,
    aten.index,
    aten.index_select,
    aten.masked_select,
    aten.narrow,
    aten.permute,
    aten.repeat,
    aten.roll,
    aten.select,
    aten.slice,
    aten.split,
    aten.split_with_sizes,
    aten.squeeze,
    aten.t,
    aten.transpose,
    aten.unbind,
    aten.unsqueeze,
}
_REDUCTIONS = {aten.sum, aten.mean, aten.amax, aten.amin}
_JOINS = {aten.cat, aten.stack}
_ADDS_AT = {aten.index_add, aten.index_add_, aten.index_copy, aten.index_copy_}
_PUTS_AT = {aten.index_put, aten.index_put_, aten._index_put_impl_}
_WRITES = _ADDS_AT | _PUTS_AT | {aten.copy_, aten.scatter_, aten.scatter_add_, aten.masked_scatter_}
# Operations that reorder rows by their values, so that the numbers are lost.
_REORDERS = {aten.sort, aten.argsort, aten.scatter, aten.scatter_add, aten.masked_scatter}


class MarkedTensors(TorchDispatchMode):
    """A context in which everything computed from marked tensors is marked too."""

    def __init__(self) -> None:
        super().__init__()
        # Keyed by the address of the storage, which is not reused while there is even a weak reference to it.
        self._marked: dict[int, StorageWeakRef] = {}

    def mark(self, *tensors: Tensor) -> None:
        """Mark these tensors."""
        for tensor in tensors:
            reference = StorageWeakRef(tensor.untyped_storage())
            self._marked.setdefault(reference.cdata, reference)

    def is_marked(self, tensor: Tensor) -> bool:
        """Return whether the tensor was marked, or computed from marked tensors."""
        return tensor.untyped_storage()._cdata in self._marked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        sources = [leaf for leaf in tensors_in((args, kwargs)) if self.is_marked(leaf)]
        result = func(*args, **kwargs)
        if sources:
            outputs = list(tensors_in(result))
            self.mark(*outputs)
            self._follow(func.overloadpacket, func, args, kwargs, sources, outputs)
        return result

    def _follow(
        self, packet: Any, func: Any, args: Any, kwargs: Mapping[str, Any], sources: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Called with the outputs of an operation that has marked inputs, and with those inputs (``sources``)."""


class TokenRows(MarkedTensors):
    """A context in which rows computed from tokens keep the token's number: b·T + t for token t of sample b.

    shape: (B, T).
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self._numbers: dict[tuple, Tensor] = {}

    def start(self, *tensors: Tensor) -> None:
        """Mark these tensors and, if they are B×T×…, number their tokens."""
        for tensor in tensors:
            self.mark(tensor)
            if tensor.shape[:2] == self.shape:
                count = self.shape[0] * self.shape[1]
                numbers = torch.arange(count, dtype=torch.int32, device=tensor.device).reshape(self.shape)
                self._keep(tensor, numbers.reshape(*self.shape, *[1] * (tensor.dim() - 2)).expand(tensor.shape))

    def number(self, tensor: Tensor, numbers: Tensor) -> None:
        """Mark a tensor and set the numbers of its entries; ``numbers`` has the same shape."""
        self.mark(tensor)
        self._keep(tensor, numbers)

    def numbers(self, tensor: Tensor) -> Tensor | None:
        """Return the token number of every entry, in the tensor's shape; None if unknown."""
        return self._numbers.get(_key(tensor)) if self.is_marked(tensor) else None

    def rows(self, x: Tensor) -> Tensor | None:
        """Return the token number of every row of x (…×n), in x's shape without its last dimension.

        The number is −1 for a row that is not a token; the result is None if the numbers are unknown.
        """
        numbers = self.numbers(x)
        return None if numbers is None or x.dim() < 2 else _of_rows(numbers)

    def _follow(
        self, packet: Any, func: Any, args: Any, kwargs: Mapping[str, Any], sources: list[Tensor], outputs: list[Tensor]
    ) -> None:
        rule = self._rule(packet)
        for tensor, numbers in zip(outputs, rule(func, args, kwargs, sources, outputs), strict=False):
            if numbers is not None and numbers.shape == tensor.shape:
                self._keep(tensor, numbers)
            elif func._schema.is_mutable:
                self._numbers.pop(_key(tensor), None)

    def _rule(self, packet: Any) -> Callable[..., Sequence[Tensor | None]]:
        if packet in _RESHAPES:
            return self._reshaped
        if packet in _MOVES:
            return self._moved
        if packet in _JOINS:
            return self._joined
        if packet in _REDUCTIONS:
            return self._reduced
        if packet in _LEFT_OPERAND:
            return lambda func, args, kwargs, sources, outputs: [
                self._like([args[_LEFT_OPERAND[packet]]], tensor) for tensor in outputs
            ]
        if packet is aten.embedding:
            return self._embedded
        if packet is aten.constant_pad_nd:
            return self._padded
        if packet in _WRITES:
            return self._written
        if packet in _REORDERS:
            return lambda func, args, kwargs, sources, outputs: [None]
        return lambda func, args, kwargs, sources, outputs: [self._like(sources, tensor) for tensor in outputs]

    def _reshaped(self, func: Any, args: Any, kwargs: Any, sources: Any, outputs: list[Tensor]) -> list[Tensor | None]:
        numbers = self.numbers(args[0])
        fits = numbers is not None and numbers.numel() == outputs[0].numel()
        return [numbers.reshape(outputs[0].shape) if numbers is not None and fits else None]

    def _moved(self, func: Any, args: Any, kwargs: Any, sources: Any, outputs: list[Tensor]) -> Sequence[Tensor | None]:
        numbers = self.numbers(args[0])
        if numbers is None:
            return [None]
        result = func(numbers, *args[1:], **kwargs)
        return [result] if isinstance(result, Tensor) else list(result)

    def _joined(self, func: Any, args: Any, kwargs: Any, sources: Any, outputs: Any) -> list[Tensor | None]:
        parts = [self.numbers(part) for part in args[0]]
        if all(numbers is None for numbers in parts):
            return [None]
        filled = [
            torch.full(part.shape, -1, dtype=torch.int32, device=part.device) if numbers is None else numbers
            for part, numbers in zip(args[0], parts, strict=True)
        ]
        return [func(filled, *args[1:], **kwargs)]

    def _reduced(self, func: Any, args: Any, kwargs: Any, sources: Any, outputs: list[Tensor]) -> list[Tensor | None]:
        """A sum over entries of a single token still belongs to that token."""
        numbers, dims = self.numbers(args[0]), args[1] if len(args) > 1 else kwargs.get("dim")
        rows = None if numbers is None or not dims or numbers.dim() < 2 else _of_rows(numbers)
        if rows is None or rows.numel() == 0:
            return [None]
        reduced = sorted({dim % args[0].dim() for dim in ([dims] if isinstance(dims, int) else dims)})
        if reduced == [args[0].dim() - 1]:
            return [rows.reshape(outputs[0].shape)]
        if reduced[-1] == args[0].dim() - 1:
            return [None]
        low, high = rows.amin(reduced), rows.amax(reduced)
        if not torch.equal(low, high):
            return [None]
        return [low.reshape(*outputs[0].shape[:-1], 1).expand(outputs[0].shape)]

    def _written(self, func: Any, args: Any, kwargs: Any, sources: Any, outputs: list[Tensor]) -> list[Tensor | None]:
        """If rows are written into another tensor, they bring their numbers, and all other rows keep theirs."""
        target, values = args[0], [arg for arg in args[1:] if isinstance(arg, Tensor) and arg.dtype == args[0].dtype]
        numbers, source = self.numbers(target), self.numbers(values[-1]) if values else None
        if source is None:
            return [numbers]
        if numbers is None:
            numbers = torch.full(target.shape, -1, dtype=torch.int32, device=target.device)
        packet = func.overloadpacket
        if packet in _ADDS_AT:
            return [numbers.index_copy(args[1], args[2], source)]
        if packet in _PUTS_AT:
            return [aten.index_put(numbers, args[1], source)]
        return [source.expand(target.shape)] if packet is aten.copy_ else [None]

    def _embedded(self, func: Any, args: Any, kwargs: Any, sources: Any, outputs: list[Tensor]) -> list[Tensor | None]:
        numbers = self.numbers(args[1])
        return [None if numbers is None else numbers[..., None].expand(outputs[0].shape)]

    def _padded(self, func: Any, args: Any, kwargs: Any, sources: Any, outputs: Any) -> list[Tensor | None]:
        numbers = self.numbers(args[0])
        return [None if numbers is None else func(numbers, args[1], -1)]

    def _like(self, sources: Sequence[Tensor], output: Tensor) -> Tensor | None:
        """Return the numbers of the first source with the same shape, else of the first with the same rows."""
        known = [(source, self.numbers(source)) for source in sources if isinstance(source, Tensor)]
        for source, numbers in known:
            if numbers is not None and source.shape == output.shape:
                return numbers
        for source, numbers in known:
            if numbers is not None and source.dim() == output.dim() > 1 and source.shape[:-1] == output.shape[:-1]:
                rows = _of_rows(numbers)
                return None if rows is None else rows[..., None].expand(output.shape)
        return None

    def _keep(self, tensor: Tensor, numbers: Tensor) -> None:
        self._numbers[_key(tensor)] = numbers


def _of_rows(numbers: Tensor) -> Tensor | None:
    """Return one number per row; None if entries of a row have different numbers."""
    if numbers.shape[-1] == 0:
        return None
    first = numbers[..., 0]
    same = numbers.stride(-1) == 0 or numbers.shape[-1] == 1 or bool((numbers == first[..., None]).all())
    return first if same else None


def _key(tensor: Tensor) -> tuple:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield all tensors in a nested structure."""
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
