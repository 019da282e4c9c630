"""The two-factor linear, and the rewrite of a model into factors and back.

A compressed layer holds ``y = up(down(x))``: two plain ``nn.Linear`` modules, so that every exporter,
quantiser and adapter library sees two ordinary matrix products. Weights are out×in throughout, as in
``nn.Linear``; transformers' ``Conv1D`` (GPT-2) stores in×out and is transposed at this border only.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from converters.errors import InputError

DenseLinear = nn.Linear | Conv1D


@dataclass(frozen=True)
class Factors:
    """``W ≈ up @ down``: up (m×r), down (r×n), bias (m) or None."""

    up: Tensor
    down: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class LowRankLinear(nn.Module):
    """Two linears in a row: ``down`` (n → r, no bias), then ``up`` (r → m, with the layer's bias)."""

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
        self.stands_for: type[DenseLinear] = nn.Linear  # what `densify` puts back
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, factors: Factors) -> "LowRankLinear":
        (m, r), n = factors.up.shape, factors.down.shape[1]
        layer = cls(n, m, r, bias=factors.bias is not None, device="meta", dtype=factors.up.dtype)
        layer.down.weight = nn.Parameter(factors.down.contiguous())
        layer.up.weight = nn.Parameter(factors.up.contiguous())
        if factors.bias is not None:
            layer.up.bias = nn.Parameter(factors.bias.contiguous())
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
        """The product up @ down (m×n), for code that reads a layer's weight; computed on each access."""
        return self.up.weight @ self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a dense linear as out×in: a view, never a copy."""
    if isinstance(layer, Conv1D):
        return layer.weight.T
    assert isinstance(layer, nn.Linear), f"not a dense linear: {type(layer).__name__}"
    return layer.weight


def add_weight_gradient(layer: nn.Module, gradient: Tensor) -> None:
    """Add a gradient given as out×in to the ``.grad`` of a dense linear's weight."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    oriented = (gradient.T if isinstance(layer, Conv1D) else gradient).to(weight.dtype)
    weight.grad = oriented.clone() if weight.grad is None else weight.grad.add_(oriented)


def factorize(model: nn.Module, factors: Mapping[str, Factors]) -> nn.Module:
    """Replace the named dense linears by their factors, in place; returns the model.

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
                f"{name}: factors {tuple(pair.up.shape)} x {tuple(pair.down.shape)} do not make {expected}"
            )
        if (pair.bias is None) != (layer.bias is None):
            raise InputError(f"{name}: the factors and the layer must both have a bias, or neither")
        _replace(model, name, LowRankLinear.from_factors(pair))
    return model


def factorize_empty(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Replace the named dense linears by uninitialised factors of the given ranks, on the layers' own
    device (``meta`` included), in place. This is how a saved model is rebuilt without its dense weights.

    Raises:
        InputError: a name is not a dense linear of the model.
    """
    for name, rank in ranks.items():
        layer = _submodule(model, name)
        if not isinstance(layer, DenseLinear):
            raise InputError(f"{name} is a {type(layer).__name__}, not a dense linear layer")
        m, n = dense_weight(layer).shape
        weight = layer.weight
        low_rank = LowRankLinear(n, m, rank, layer.bias is not None, weight.device, weight.dtype)
        _replace(model, name, low_rank)
    return model


def densify(model: nn.Module) -> nn.Module:
    """Replace every two-factor linear by the dense one that it equals, in place; returns the model."""
    for name, layer in list(low_rank_layers(model).items()):
        weight, bias = layer.weight.detach(), layer.bias
        dense: DenseLinear
        if layer.stands_for is Conv1D:
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
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}


def factors_of(model: nn.Module) -> dict[str, Factors]:
    """The factors of every two-factor linear, detached, by layer name."""
    return {
        name: Factors(
            layer.up.weight.detach(),
            layer.down.weight.detach(),
            None if layer.up.bias is None else layer.up.bias.detach(),
        )
        for name, layer in low_rank_layers(model).items()
    }


@torch.no_grad()
def balance(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with its singular values shared evenly: both Gram matrices, upᵀ up and
    down downᵀ, become diag(σ), largest first. Neither factor is then larger than it need be, which is
    what low-precision storage and fine-tuning ask for.

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


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"the model has no layer named {name}") from error


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    old = model.get_submodule(name)
    new.train(old.training)
    if isinstance(new, LowRankLinear) and isinstance(old, Conv1D):
        new.stands_for = Conv1D
    model.set_submodule(name, new)
