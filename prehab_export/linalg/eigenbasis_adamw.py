"""Run AdamW in coordinates in which a layer's curvature is nearly diagonal.

The K-FAC curvature of a layer's weight is G ⊗ C. So for the factor ``up``, it is diagonal on the left in the
eigenvectors of G, and for ``down`` on the right in the eigenvectors of C. Adam scales each coordinate on its own and
works best in such a basis. This is SOAP (arXiv 2409.11321), with the moments that calibration collects anyway instead
of running averages, so the bases never change.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prehab_export.linalg.slices import gathered, sliced


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis for the rows (``left``, m×m), the columns (``right``, n×n) or both of an m×n parameter."""

    left: Tensor | None = None
    right: Tensor | None = None

    def into(self, values: Tensor) -> Tensor:
        """Return the coordinates of ``values`` (m×n) in this basis."""
        values = values if self.left is None else self.left.T @ values
        return values if self.right is None else values @ self.right

    def back(self, values: Tensor) -> Tensor:
        """Return the m×n matrix with these coordinates: the inverse of `into`."""
        values = values if self.left is None else self.left @ values
        return values if self.right is None else values @ self.right.T


Bases = Mapping[Tensor, Basis]


class EigenbasisAdamW(torch.optim.AdamW):
    """AdamW that updates the parameters in ``bases`` in their own basis, and all others as usual."""

    def __init__(self, parameters: Any, bases: Bases, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.bases = bases

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Turn parameters and gradients into their bases, take AdamW's step, and turn the parameters back.

        A parameter that is shared out over processes is whole only while it is turned.
        """
        in_bases = [
            (parameter, self.bases[parameter])
            for group in self.param_groups
            for parameter in group["params"]
            if parameter in self.bases and parameter.grad is not None
        ]
        for parameter, basis in in_bases:
            parameter.copy_(sliced(basis.into(gathered(parameter)), parameter))
            parameter.grad = sliced(basis.into(gathered(parameter.grad)), parameter)
        result = super().step(closure)
        for parameter, basis in in_bases:
            parameter.copy_(sliced(basis.back(gathered(parameter)), parameter))
        return result
