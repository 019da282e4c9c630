"""Finds which layers read the same tensor, and how the rows of each layer's input are ordered."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from converters.errors import InputError
from converters.patterns import exclude_options
from prehab_export.compression.activations import RowOrder, frozen, row_order
from prehab_export.compression.token_rows import token_rows
from prehab_export.inputs import Batch, Task, device_of, moved

# Layer → the order of its rows in each of its runs in one forward pass.
RowOrders = dict[str, list[RowOrder]]


def shared_inputs(model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Map every layer to its input group, by observing which layers get the very same tensor.

    Raises:
        InputError: the model's forward pass does not reach a layer.
    """
    return trace_inputs(model, task, batch, layers)[0]


def trace_inputs(
    model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module]
) -> tuple[dict[str, str], RowOrders]:
    """Return the groups of `shared_inputs`, and the order of each layer's rows in each of its runs.

    Two samples are usually enough; the whole batch is used if they do not reach every expert.
    """
    try:
        return _trace_batch(model, task, {key: value[[0, -1]] for key, value in batch.items()}, layers)
    except InputError:
        return _trace_batch(model, task, batch, layers)


def _trace_batch(
    model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module]
) -> tuple[dict[str, str], RowOrders]:
    keys: dict[str, list[tuple]] = {name: [] for name in layers}
    orders: RowOrders = {name: [] for name in layers}
    # An input's storage is known by its address, which is not used twice while there is even a weak reference to it.
    # The inputs of all layers themselves would take as much memory as the moments.
    references: list[StorageWeakRef] = []
    batch = moved(batch, device_of(model))
    mask = task.token_mask(batch)
    rows = None if mask is None else token_rows(batch, mask)

    def watch(name: str) -> Callable:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            references.append(StorageWeakRef(x.untyped_storage()))
            keys[name].append((references[-1].cdata, x.storage_offset(), x.shape, x.stride(), x._version))
            orders[name].append(row_order(x, rows))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with frozen(model), torch.no_grad(), rows or nullcontext():
            task.logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    unreached = [name for name, runs in keys.items() if not runs]
    if unreached:
        raise InputError(f"the model never runs {exclusion(unreached, keys)}")
    leaders: dict[tuple, str] = {}
    return {name: leaders.setdefault(tuple(runs), name) for name, runs in keys.items()}, orders


def exclusion(names: Sequence[str], layers: Iterable[str]) -> str:
    """Name the first of these layers, the number of the others, and the options that exclude exactly these layers."""
    more = f" and {len(names) - 1} more layer{'s' if len(names) > 2 else ''}" if len(names) > 1 else ""
    pronoun = "them" if more else "it"
    options = exclude_options(names, [name for name in layers if name not in names])
    return f"{names[0]}{more} on this data; exclude {pronoun} with {options}"
