"""AdamW in the coordinates in which a layer's curvature is nearly diagonal.

The K-FAC curvature of a layer's weight is G ⊗ C, so of a factor pair's ``up`` it is diagonal on the left in the
eigenvectors of G, and of ``down`` on the right in those of C. Adam, which scales every coordinate by itself, does best
there: SOAP (arXiv 2409.11321), with the moments that calibration has collected anyway in the place of running
averages, and hence with bases that stay.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns for the rows (``left``, m×m) or the columns (``right``, n×n) of an m×n parameter."""

    left: Tensor | None = None
    right: Tensor | None = None

    def into(self, values: Tensor) -> Tensor:
        values = values if self.left is None else self.left.T @ values
        return values if self.right is None else values @ self.right

    def back(self, values: Tensor) -> Tensor:
        values = values if self.left is None else self.left @ values
        return values if self.right is None else values @ self.right.T


Bases = Mapping[Tensor, Basis]


class EigenbasisAdamW(torch.optim.AdamW):
    """AdamW of which the parameters in ``bases`` are stepped in their basis, all others as ever."""

    def __init__(self, parameters: Any, bases: Bases, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.bases = bases

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        turned = [
            (parameter, self.bases[parameter])
            for group in self.param_groups
            for parameter in group["params"]
            if parameter in self.bases and parameter.grad is not None
        ]
        for parameter, basis in turned:
            parameter.copy_(basis.into(parameter))
            parameter.grad = basis.into(parameter.grad)
        result = super().step(closure)
        for parameter, basis in turned:
            parameter.copy_(basis.back(parameter))
        return result
