"""Cut a product of two thin factors back to a lower rank, optimally in a weighted Frobenius norm.

The norm is ‖W − Ŵ‖² = tr(G (W − Ŵ) C (W − Ŵ)ᵀ), with C (n×n) over inputs and G (m×m) over outputs. Both are symmetric
positive semi-definite, or None for the identity. With G = L_G L_Gᵀ and C = L_C L_Cᵀ, it is the Frobenius norm of
L_Gᵀ (W − Ŵ) L_C. So Eckart–Young applies to the whitened factors, whose SVD costs two thin QRs and one R×R SVD; W
itself (m×n) is never formed. Everything runs in float64. Layers that share ``down`` form one W, with their outputs
stacked and one G per layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from converters.lowrank import Factors, balance
from converters.roots import root_of, weighs

OutputMetric = Tensor | Sequence[Tensor] | None


@torch.no_grad()
def retruncate(factors: Factors, rank: int, C: Tensor | None = None, G: OutputMetric = None) -> Factors:
    """Return the best product of this rank, balanced, in the factors' dtype, with the same bias.

    Ŵ is a projection of W from the left, so neither metric is inverted and singular metrics are allowed. Inputs that C
    has not seen keep their image in the output directions that remain. A metric of zero counts as the identity (see
    ``converters.roots``).

    Args:
        factors: up (m×R), down (R×n).
        rank: the result has rank min(rank, R, m, n).
        C: n×n second moment of the inputs, or None.
        G: m×m metric of the outputs, or None; or the blocks of a block-diagonal one, with sizes that add up to m.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    up, down = factors.up.double(), factors.down.double()
    C, G = _or_identity(C, G)
    white_up, white_down = _whiten(up, down, C, G)
    q, r_up = torch.linalg.qr(white_up)
    r_down = torch.linalg.qr(white_down.T).R
    u, _, vt = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    u = u[:, : min(rank, len(vt))]
    basis = q @ u if G is None else up @ (torch.linalg.pinv(r_up) @ u)
    new_up, new_down = balance(basis, (u.T @ r_up) @ down)
    return Factors(new_up.to(factors.up.dtype), new_down.to(factors.down.dtype), factors.bias)


@torch.no_grad()
def relative_error(before: Factors, after: Factors, C: Tensor | None = None, G: OutputMetric = None) -> float:
    """Return ‖W − Ŵ‖ / ‖W‖ in the metric of `retruncate`, with W from ``before`` and Ŵ from ``after``; 0 for W = 0."""
    up, down = before.up.double(), before.down.double()
    C, G = _or_identity(C, G)
    white_up, white_down = _whiten(
        torch.cat([up, -after.up.double()], dim=1), torch.cat([down, after.down.double()]), C, G
    )
    total = _product_norm(white_up[:, : before.rank], white_down[: before.rank])
    return _product_norm(white_up, white_down) / total if total > 0 else 0.0


def _whiten(up: Tensor, down: Tensor, C: Tensor | None, G: OutputMetric) -> tuple[Tensor, Tensor]:
    """``L_Gᵀ up`` and ``down L_C``."""
    white_up = up
    if G is not None:
        blocks = [G] if isinstance(G, Tensor) else G
        parts = up.split([block.shape[0] for block in blocks])
        white_up = torch.cat([root_of(block).to(up.device).T @ part for block, part in zip(blocks, parts, strict=True)])
    white_down = down if C is None else down @ root_of(C).to(down.device)
    return white_up, white_down


def _or_identity(C: Tensor | None, G: OutputMetric) -> tuple[Tensor | None, OutputMetric]:
    """Replace a metric that weighs nothing by None, the identity."""
    blocks = [G] if isinstance(G, Tensor) else G or []
    return C if C is not None and weighs(C) else None, G if any(weighs(block) for block in blocks) else None


def _product_norm(up: Tensor, down: Tensor) -> float:
    """‖up down‖_F, without forming the product."""
    r_up, r_down = torch.linalg.qr(up).R, torch.linalg.qr(down.T).R
    return torch.linalg.matrix_norm(r_up @ r_down.T).item()
