"""A product of two thin factors cut back to a lower rank, optimally in a weighted Frobenius norm.

‖W − Ŵ‖² is tr(G (W − Ŵ) C (W − Ŵ)ᵀ) with C (n×n) over inputs and G (m×m) over outputs, symmetric positive
semi-definite, or None for the identity. With G = L_G L_Gᵀ and C = L_C L_Cᵀ it is the Frobenius norm of
L_Gᵀ (W − Ŵ) L_C, so Eckart–Young applies to the whitened factors, whose SVD costs two thin QRs and one R×R
SVD. W itself (m×n) is never formed. All in float64. Layers that share ``down`` are one W, their outputs stacked,
with a G for each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from converters.lowrank import Factors, balance
from converters.roots import root_of, weighs

OutputMetric = Tensor | Sequence[Tensor] | None


@torch.no_grad()
def retruncate(factors: Factors, rank: int, C: Tensor | None = None, G: OutputMetric = None) -> Factors:
    """The best product of the given rank, balanced, in the factors' dtype; the bias is passed on.

    Ŵ is a projection of W from the left, so neither metric is inverted: singular ones are welcome, and
    inputs that C has not seen keep what the kept output directions make of them. A metric of zero counts as
    the identity (see ``converters.roots``).

    Args:
        factors: up (m×R), down (R×n).
        rank: at most this many directions are kept, min(rank, R, m, n) to be exact.
        C: n×n input second moment, or None.
        G: m×m output metric, or None; or the blocks of a block-diagonal one, their sizes adding up to m.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    up, down = factors.up.double(), factors.down.double()
    C, G = _or_identity(C, G)
    left, right = _whiten(up, down, C, G)
    q, r_left = torch.linalg.qr(left)
    r_right = torch.linalg.qr(right.T).R
    u, _, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    u = u[:, : min(rank, len(vt))]
    basis = q @ u if G is None else up @ (torch.linalg.pinv(r_left) @ u)
    new_up, new_down = balance(basis, (u.T @ r_left) @ down)
    return Factors(new_up.to(factors.up.dtype), new_down.to(factors.down.dtype), factors.bias)


@torch.no_grad()
def relative_error(before: Factors, after: Factors, C: Tensor | None = None, G: OutputMetric = None) -> float:
    """‖W − Ŵ‖ / ‖W‖ in the metric of `retruncate`, W from ``before`` and Ŵ from ``after``; 0 for W = 0."""
    up, down = before.up.double(), before.down.double()
    C, G = _or_identity(C, G)
    left, right = _whiten(torch.cat([up, -after.up.double()], dim=1), torch.cat([down, after.down.double()]), C, G)
    total = _product_norm(left[:, : before.rank], right[: before.rank])
    return _product_norm(left, right) / total if total > 0 else 0.0


def _whiten(up: Tensor, down: Tensor, C: Tensor | None, G: OutputMetric) -> tuple[Tensor, Tensor]:
    left = up
    if G is not None:
        blocks = [G] if isinstance(G, Tensor) else G
        parts = up.split([block.shape[0] for block in blocks])
        left = torch.cat([root_of(block).to(up.device).T @ part for block, part in zip(blocks, parts, strict=True)])
    right = down if C is None else down @ root_of(C).to(down.device)
    return left, right


def _or_identity(C: Tensor | None, G: OutputMetric) -> tuple[Tensor | None, OutputMetric]:
    """The metric, with the identity on a side that weighs nothing."""
    blocks = [G] if isinstance(G, Tensor) else G or []
    return C if C is not None and weighs(C) else None, G if any(weighs(block) for block in blocks) else None


def _product_norm(left: Tensor, right: Tensor) -> float:
    r_left, r_right = torch.linalg.qr(left).R, torch.linalg.qr(right.T).R
    return torch.linalg.matrix_norm(r_left @ r_right.T).item()
