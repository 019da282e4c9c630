"""Which linear layers of a model are compressed: those inside its repeated blocks.

Found from the structure of the module tree, not from lists of names, so that a new family needs no row
here. Embeddings, heads, tied weights and routers stay dense unless a pattern asks for them.
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
    """Dense linears to compress, by name, in the model's own order.

    Patterns are shell-style (``*.attention.*``) and match the whole dotted name. ``include`` replaces the
    default choice and may name any dense linear whose weight is not tied; ``exclude`` is taken away afterwards.
    A layer that is registered under several names goes by the first of them; a pattern may match any.

    Raises:
        InputError: a pattern matches no layer, or nothing is left.
    """
    dense = {name: module for name, module in model.named_modules() if isinstance(module, DenseLinear)}
    known = {id(module) for module in dense.values()}
    every = {name: module for name, module in model.named_modules(remove_duplicate=False) if id(module) in known}
    tied = _tied_weights(model)
    free = {name: module for name, module in every.items() if id(module.weight) not in tied}
    if include:
        chosen = {id(free[name]) for pattern in include for name in _matches(pattern, free, every)}
    else:
        chosen = {id(module) for name, module in free.items() if _in_repeated_block(model, name)}
        chosen -= {id(module) for name, module in free.items() if _is_router(model, name)}
    for pattern in exclude:
        chosen -= {id(every[name]) for name in _matches(pattern, every, every)}
    if not chosen:
        raise InputError(f"no layer is left to compress: {_why_none(free, exclude)}")
    return {name: module for name, module in dense.items() if id(module) in chosen}


def _why_none(free: Mapping[str, nn.Module], exclude: Sequence[str]) -> str:
    """Why nothing was chosen, and what can be done."""
    if exclude:
        return "--exclude takes all of them; loosen it, or choose layers with --include"
    if not free:
        return "the model has no linear layer of its own weight (convolutions and other kinds stay as they are)"
    names = [name for _, name in zip(range(3), free, strict=False)]
    return (
        "no linear layer lies in the model's repeated blocks (convolutions and other kinds stay as they are); "
        f"those outside, such as {', '.join(names)}, can be named with --include"
    )


def _matches(pattern: str, allowed: Mapping[str, nn.Module], dense: Mapping[str, nn.Module]) -> list[str]:
    found = [name for name in allowed if fnmatchcase(name, pattern)]
    if found:
        return found
    if any(fnmatchcase(name, pattern) for name in dense):
        raise InputError(f"pattern {pattern!r} matches only layers whose weight is tied to another; leave it out")
    example = ", ".join(list(dense)[:3])
    raise InputError(f"pattern {pattern!r} matches no linear layer; names look like: {example}")


def _in_repeated_block(model: nn.Module, name: str) -> bool:
    """Whether some ancestor is an entry of a list of like-built blocks (``encoder.layer.3.…``)."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        if isinstance(parent, nn.ModuleList) and depth < len(parts) - 1:
            return True
    return False


def _is_router(model: nn.Module, name: str) -> bool:
    """A linear that scores experts: small, decisive, and ruined by truncation."""
    if name.rsplit(".", 1)[-1] not in ROUTER_NAMES:
        return False
    config = getattr(model, "config", None)
    experts = frozenset() if config is None else expert_counts(config)
    layer = model.get_submodule(name)
    return not experts or getattr(layer, "out_features", None) in experts


def _tied_weights(model: nn.Module) -> set[int]:
    """Identities of weights that stand in more than one module (input and output embeddings, say)."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {key for key, count in owners.items() if count > 1}
