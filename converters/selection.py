"""Select the linear layers to compress: those inside a model's repeated blocks.

They are found from the structure of the module tree, not from lists of names, so a new model family needs no entry
here. Embeddings, heads, tied weights and routers stay dense unless a pattern names them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from converters.errors import InputError
from converters.lowrank import DenseLinear
from converters.model_config import expert_counts

ROUTER_NAMES = frozenset({"gate", "router", "gating"})


def select_layers(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> dict[str, DenseLinear]:
    """Select the dense linears to compress, by name, in the model's own order.

    Patterns are shell-style (``*.attention.*``) and match the whole dotted name. ``include`` replaces the default
    selection and may name any dense linear whose weight is not tied; ``exclude`` is applied afterwards. A layer that is
    registered under several names is returned under the first; a pattern may match any of them.

    Raises:
        InputError: a pattern matches no layer, or no layer is left.
    """
    dense = {name: module for name, module in model.named_modules() if isinstance(module, DenseLinear)}
    dense_ids = {id(module) for module in dense.values()}
    all_names = {
        name: module for name, module in model.named_modules(remove_duplicate=False) if id(module) in dense_ids
    }
    tied = _tied_weights(model)
    untied = {name: module for name, module in all_names.items() if id(module.weight) not in tied}
    if include:
        selected = {id(untied[name]) for pattern in include for name in _matches(pattern, untied, all_names)}
    else:
        selected = {id(module) for name, module in untied.items() if _in_repeated_block(model, name)}
        selected -= {id(module) for name, module in untied.items() if _is_router(model, name)}
    for pattern in exclude:
        selected -= {id(all_names[name]) for name in _matches(pattern, all_names, all_names)}
    if not selected:
        raise InputError(f"no layer is left to compress: {_why_none(untied, exclude)}")
    return {name: module for name, module in dense.items() if id(module) in selected}


def _why_none(untied: Mapping[str, nn.Module], exclude: Sequence[str]) -> str:
    """Why no layer is selected, and what can be done about it."""
    if exclude:
        return "--exclude removes all layers; loosen it, or select layers with --include"
    if not untied:
        return "the model has no linear layer with a weight of its own (layers of other kinds are not compressed)"
    names = [name for _, name in zip(range(3), untied, strict=False)]
    return (
        "no linear layer is in the model's repeated blocks (convolutions and other kinds are not compressed); "
        f"those outside, such as {', '.join(names)}, can be named with --include"
    )


def _matches(pattern: str, allowed: Mapping[str, nn.Module], dense: Mapping[str, nn.Module]) -> list[str]:
    """The allowed names that match a pattern.

    Raises:
        InputError: there are none.
    """
    names = [name for name in allowed if fnmatchcase(name, pattern)]
    if names:
        return names
    if any(fnmatchcase(name, pattern) for name in dense):
        raise InputError(f"pattern {pattern!r} only matches layers whose weight is tied to another; remove it")
    examples = ", ".join(list(dense)[:3])
    raise InputError(f"pattern {pattern!r} matches no linear layer; names look like: {examples}")


def _in_repeated_block(model: nn.Module, name: str) -> bool:
    """Whether the layer is inside an entry of a list of blocks (``encoder.layer.3.…``)."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        if isinstance(parent, nn.ModuleList) and depth < len(parts) - 1:
            return True
    return False


def _is_router(model: nn.Module, name: str) -> bool:
    """Whether a linear scores experts: such a layer is small and decisive, and truncation would ruin it."""
    if name.rsplit(".", 1)[-1] not in ROUTER_NAMES:
        return False
    config = getattr(model, "config", None)
    experts = frozenset() if config is None else expert_counts(config)
    layer = model.get_submodule(name)
    return not experts or getattr(layer, "out_features", None) in experts


def _tied_weights(model: nn.Module) -> set[int]:
    """The ids of weights that are in more than one module, such as input and output embeddings."""
    uses = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {key for key, count in uses.items() if count > 1}
