"""Define the two-factor linear, and rewrite a model into factors and back.

A compressed layer computes ``y = up(down(x))`` with two plain ``nn.Linear`` modules, so every exporter, quantiser and
adapter library sees two ordinary matrix products. Weights are out×in everywhere, as in ``nn.Linear``; transformers'
``Conv1D`` (GPT-2) stores in×out and is only transposed in this module.

Layers that read the same input (q, k and v; gate and up) may hold the same ``down`` module. It is then stored, counted
and trained once, and ``down(x)`` need only be computed once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from converters.errors import InputError

DenseLinear = nn.Linear | Conv1D


@dataclass(frozen=True)
class Factors:
    """``W ≈ up @ down``: up (m×r), down (r×n), bias (m) or None.

    If the factors of several layers hold the same ``down`` tensor object, the layers share one ``down``.
    """

    up: Tensor
    down: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class LowRankLinear(nn.Module):
    """Two linears in a row: ``down`` (n → r, no bias), then ``up`` (r → m, with the layer's bias).

    Raises:
        ValueError: the rank is below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.dense_class: type[DenseLinear] = nn.Linear  # the class that `densify` restores
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, factors: Factors, *, copy: bool = True) -> "LowRankLinear":
        """Build a layer from factors.

        Args:
            copy: copy the factors, so that changes to the layer do not change them.
        """
        (m, r), n = factors.up.shape, factors.down.shape[1]
        layer = cls(n, m, r, bias=factors.bias is not None, device="meta", dtype=factors.up.dtype)

        def parameter(tensor: Tensor) -> nn.Parameter:
            return nn.Parameter(tensor.clone(memory_format=torch.contiguous_format) if copy else tensor)

        layer.down.weight, layer.up.weight = parameter(factors.down), parameter(factors.up)
        if factors.bias is not None:
            layer.up.bias = parameter(factors.bias)
        return layer

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features

    @property
    def rank(self) -> int:
        return self.down.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    @property
    def weight(self) -> Tensor:
        """The product up @ down (m×n), for code that reads a layer's weight; computed at each access."""
        return self.up.weight @ self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a dense linear as out×in: a view, never a copy."""
    if isinstance(layer, Conv1D):
        return layer.weight.T
    assert isinstance(layer, nn.Linear), f"not a dense linear: {type(layer).__name__}"
    return layer.weight


def replace_weight(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give a dense linear a new weight (out×in) and, if it has one, a new bias; the old tensors do not change.

    Raises:
        InputError: the shapes differ.
    """
    old = dense_weight(layer)
    if weight.shape != old.shape:
        raise InputError(f"a weight of {tuple(weight.shape)} does not fit a layer of {tuple(old.shape)}")
    oriented = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
    layer.weight = nn.Parameter(oriented.to(old.device), requires_grad=old.requires_grad)
    if layer.bias is not None and bias is not None:
        assert isinstance(layer.bias, nn.Parameter)
        layer.bias = nn.Parameter(bias.to(old.device), requires_grad=layer.bias.requires_grad)


def add_weight_gradient(layer: nn.Module, gradient: Tensor) -> None:
    """Add a gradient given as out×in to the ``.grad`` of a dense linear's weight."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    oriented = (gradient.T if isinstance(layer, Conv1D) else gradient).to(weight.dtype)
    weight.grad = oriented.clone() if weight.grad is None else weight.grad.add_(oriented)


def factorize(model: nn.Module, factors: Mapping[str, Factors], *, copy: bool = True) -> nn.Module:
    """Replace the named dense linears by their factors, in place; returns the model. Layers whose factors hold the same
    ``down`` tensor object share one ``down`` module.

    Args:
        copy: copy the factors, so that changes to the model do not change them.

    Raises:
        InputError: a name is not a dense linear of the model, or shapes do not fit.
    """
    for name, pair in factors.items():
        layer = _submodule(model, name)
        if not isinstance(layer, DenseLinear):
            raise InputError(f"{name} is a {type(layer).__name__}, not a dense linear layer")
        expected = tuple(dense_weight(layer).shape)
        if (pair.up.shape[0], pair.down.shape[1]) != expected or pair.up.shape[1] != pair.down.shape[0]:
            raise InputError(
                f"{name}: factors {tuple(pair.up.shape)} x {tuple(pair.down.shape)} do not multiply to {expected}"
            )
        if (pair.bias is None) != (layer.bias is None):
            raise InputError(f"{name}: the factors and the layer must both have a bias, or neither")
        _replace(model, name, LowRankLinear.from_factors(pair, copy=copy))
    share_down(model, _grouped({name: factors[name].down for name in low_rank_layers(model) if name in factors}))
    return model


def factorize_empty(model: nn.Module, ranks: Mapping[str, int], shared: Iterable[Sequence[str]] = ()) -> nn.Module:
    """Replace the named dense linears by uninitialised factors of these ranks, in place, on the layers' own device
    (including ``meta``). This rebuilds a saved model without allocating its dense weights.

    Args:
        ranks: rank by layer name.
        shared: groups of layers that share one ``down``, as returned by `shared_groups`.

    Raises:
        InputError: a name is not a dense linear of the model, or a group cannot share.
    """
    for name, rank in ranks.items():
        layer = _submodule(model, name)
        if not isinstance(layer, DenseLinear):
            raise InputError(f"{name} is a {type(layer).__name__}, not a dense linear layer")
        m, n = dense_weight(layer).shape
        weight = layer.weight
        low_rank = LowRankLinear(n, m, rank, layer.bias is not None, weight.device, weight.dtype)
        _replace(model, name, low_rank)
    share_down(model, shared)
    return model


def densify(model: nn.Module) -> nn.Module:
    """Replace every two-factor linear by the equal dense linear, in place; returns the model."""
    for name, layer in list(low_rank_layers(model).items()):
        weight, bias = layer.weight.detach(), layer.bias
        dense: DenseLinear
        if layer.dense_class is Conv1D:
            with torch.device("meta"):
                dense = Conv1D(layer.out_features, layer.in_features)
            weight = weight.T.contiguous()
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
        dense.weight = nn.Parameter(weight)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach())
        _replace(model, name, dense)
    return model


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Return the two-factor linears of a model, each once, under its first name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}


def shared_groups(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the groups of layers that share one ``down``, in the model's own order."""
    return _grouped({name: layer.down for name, layer in low_rank_layers(model).items()})


def share_down(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Give all layers of a group the ``down`` module of the first, in place.

    This module may be more than a linear: PEFT only wraps a module under the first name that it finds, and this
    function passes the wrapper on to the others. Call it again, with the same groups, after PEFT has removed the
    wrapper.

    Raises:
        InputError: a name is not a two-factor linear, or the shapes of ``down`` differ.
    """
    for first, *others in groups:
        source = _low_rank(model, first)
        for name in others:
            layer = _low_rank(model, name)
            if layer.down.weight.shape != source.down.weight.shape:
                raise InputError(
                    f"{name} cannot share the down factor of {first}: shapes "
                    f"{tuple(layer.down.weight.shape)} and {tuple(source.down.weight.shape)}"
                )
            layer.down = source.down
            # This makes save_pretrained write the tensor under the first layer's name only.
            layer._tied_weights_keys = {"down.weight": f"{first}.down.weight"}  # type: ignore[assignment]


def factors_of(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Factors]:
    """Return the factors of the named two-factor linears, by default of all, detached, by layer name; a shared ``down``
    is one tensor.

    Raises:
        InputError: a name is not a two-factor linear.
    """
    layers = low_rank_layers(model) if names is None else {name: _low_rank(model, name) for name in names}
    downs = {id(layer.down): layer.down.weight.detach() for layer in layers.values()}
    return {
        name: Factors(
            layer.up.weight.detach(),
            downs[id(layer.down)],
            None if layer.up.bias is None else layer.up.bias.detach(),
        )
        for name, layer in layers.items()
    }


def exchange_factors(model: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Give two-factor linears these tensors as their factors, in place and without a copy.

    Raises:
        InputError: a name is not a two-factor linear, or the shapes differ.
    """
    for name, pair in factors.items():
        layer = _low_rank(model, name)
        shapes = [(layer.up.weight.shape, layer.down.weight.shape), (pair.up.shape, pair.down.shape)]
        if shapes[0] != shapes[1]:
            raise InputError(f"{name}: factors of shapes {shapes[1]} do not fit a layer of shapes {shapes[0]}")
        trains = layer.up.weight.requires_grad
        layer.up.weight, layer.down.weight = (nn.Parameter(tensor, trains) for tensor in (pair.up, pair.down))
        if pair.bias is not None:
            layer.up.bias = nn.Parameter(pair.bias, trains)


@torch.no_grad()
def balance(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product that share its singular values evenly.

    Both Gram matrices, upᵀ up and down downᵀ, become diag(σ), largest first. Neither factor is then larger than
    necessary, which helps low-precision storage and fine-tuning.

    Args:
        up: m×r.
        down: r×n.

    Returns:
        up (m×k) and down (k×n) with k = min(r, m, n), computed in float64, in the inputs' dtypes.
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, sigma, vt = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    root = sigma.sqrt()
    new_up, new_down = (q_up @ u) * root, root[:, None] * (vt @ q_down.T)
    return new_up.to(up.dtype), new_down.to(down.dtype)


def _grouped(objects: Mapping[str, object]) -> list[tuple[str, ...]]:
    """The groups of two or more names that refer to the same object."""
    names: dict[int, list[str]] = {}
    for name, value in objects.items():
        names.setdefault(id(value), []).append(name)
    return [tuple(group) for group in names.values() if len(group) > 1]


def _low_rank(model: nn.Module, name: str) -> LowRankLinear:
    layer = _submodule(model, name)
    if not isinstance(layer, LowRankLinear):
        raise InputError(f"{name} is a {type(layer).__name__}, not a two-factor linear: it has no down to share")
    return layer


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"the model has no layer named {name}") from error


def names_of(model: nn.Module, name: str) -> list[str]:
    """Return all names of the module with this name, including this one, in the model's own order."""
    module = _submodule(model, name)
    return [other for other, candidate in model.named_modules(remove_duplicate=False) if candidate is module]


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace a module by another, under all of its names."""
    old = model.get_submodule(name)
    new.train(old.training)
    if isinstance(new, LowRankLinear) and isinstance(old, Conv1D):
        new.dense_class = Conv1D
    # A parent with several names is one module, so the new module may already be there under the other names.
    for other in names_of(model, name):
        if model.get_submodule(other) is old:
            model.set_submodule(other, new)
