"""Smooth stand-ins for the rank of a whitened weight M, with closed-form gradients.

Each takes M (m×n) and returns ``(value, gradient in M)``. None differentiates through a decomposition.

===============  ==============================  ======================================
name             R(M)                            source
===============  ==============================  ======================================
``nuclear``      ‖M‖_*                           ℓ1 of the spectrum
``stable-rank``  ‖M‖_*² / ‖M‖_F²                 Prehab (arXiv 2512.01980)
``spectral``     ‖M‖_F² / ‖M‖_2²                 classical stable rank
``tail``         Σ_{i>r} σ_i²                    the truncation loss itself, at the target rank
===============  ==============================  ======================================
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def nuclear(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``‖M‖_*``; its gradient is the polar factor UVᵀ.

    >>> value, gradient = nuclear(torch.diag(torch.tensor([3.0, 1.0])))
    >>> round(float(value), 3)
    4.0
    """
    polar = polar_factor(matrix)
    return (polar * matrix).sum(), polar


def stable_rank(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``‖M‖_*² / ‖M‖_F²``: 1 for rank one, rank M when all its singular values are equal."""
    norm, polar = nuclear(matrix)
    energy = matrix.square().sum()
    value = norm.square() / energy
    return value, 2 * norm / energy * polar - 2 * value / energy * matrix


def spectral(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``‖M‖_F² / ‖M‖_2²`` by power iteration from ``start`` (n); returns the vector to start from next time."""
    v = start
    for _ in range(2):
        u = torch.nn.functional.normalize(matrix @ v, dim=0)
        v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
    sigma = u @ matrix @ v
    energy = matrix.square().sum()
    value = energy / sigma.square()
    return value, 2 * matrix / sigma.square() - 2 * value / sigma * torch.outer(u, v), v


def tail(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """``‖M − P M‖_F²`` with P the projector on ``basis``: m×r (left) or n×r (right), orthonormal columns.

    With the top-r singular vectors as basis this is Σ_{i>r} σ_i²; with any other it lies above, so a basis that
    has gone a little stale still bounds the truncation loss.
    """
    if basis.shape[0] == matrix.shape[0]:
        rest = matrix - basis @ (basis.T @ matrix)
    else:
        rest = matrix - (matrix @ basis) @ basis.T
    return rest.square().sum(), 2 * rest


def top_basis(matrix: Tensor, rank: int) -> Tensor:
    """Top-``rank`` singular vectors on the smaller side of M: min(m, n)×rank."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigh(gram)[1][:, -rank:]


def polar_factor(matrix: Tensor, steps: int = 10) -> Tensor:
    """UVᵀ of M by matrix products only (Polar Express, arXiv 2505.16932).

    Each step applies the odd quintic that is best on the interval where the singular values now lie. Ten steps
    bring every singular value above 1e-5 of the norm to 1 within float32's noise; smaller ones count for nothing
    in ‖M‖_*.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() * 1.01 + torch.finfo(x.dtype).tiny)
    for a, b, c in polar_coefficients(1e-5, steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


@lru_cache(maxsize=8)
def polar_coefficients(lowest: float, steps: int) -> tuple[tuple[float, float, float], ...]:
    """Coefficients (a, b, c) of the successive minimax quintics ``ax + bx³ + cx⁵ ≈ 1`` on [lowest, 1]."""
    low, high, result = lowest, 1.0, []
    for _ in range(steps):
        (a, b, c), error = _minimax_quintic(low, high)
        result.append((a, b, c))
        low, high = 1 - error, 1 + error
    return tuple(result)


def _minimax_quintic(low: float, high: float) -> tuple[tuple[float, float, float], float]:
    """Best odd quintic approximation of 1 on [low, high], and its largest error, by Remez exchange."""
    if high - low < 1e-7:  # converged: the Newton–Schulz quintic, exact at 1 to third order
        return (15 / 8, -10 / 8, 3 / 8), 0.0
    points = np.array([low, (3 * low + high) / 4, (low + 3 * high) / 4, high])
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    for _ in range(50):
        system = np.stack([points, points**3, points**5, signs], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt(np.sort([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)]))
        if np.allclose(inner, points[1:3], rtol=1e-10, atol=0):
            break
        points[1:3] = inner
    return (float(a), float(b), float(c)), float(abs(error))
