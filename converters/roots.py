"""Roots of symmetric positive semidefinite matrices, whatever rounding made of them, and what a moment of zero means.

A moment of zero says that nothing ever comes through on that side: a layer whose input is always 0, or constant where
the bias takes the mean, or whose output has no part in the loss. Any factors are as good there, and cost nothing. Then
the factors are those of the identity in its place, which are finite, the same every time, and the best guess should
something come through one day; and the cost is 0. `weighs` decides, and `damped` keeps what is inverted regular.

Tensors in, tensors out; float64.
"""

import torch
from torch import Tensor

# Shares of the mean diagonal that are tried in turn on a matrix that has to have a triangular factor.
_DAMPING = (0.0, 1e-8, 1e-6, 1e-4)


def weighs(moment: Tensor) -> bool:
    """Whether a moment (n×n) weighs anything: if not, it is zero to rounding."""
    return bool(moment.diagonal().sum(dtype=torch.float64) > 0)


def scale_of(moment: Tensor) -> Tensor:
    """The mean of the diagonal, what dampings are a share of; 1 for a moment that weighs nothing."""
    mean = moment.diagonal().double().mean()
    return mean if weighs(moment) else torch.ones_like(mean)


def damped(matrix: Tensor, share: float) -> Tensor:
    """``A + share · mean(diag A) · I``, float64: gives directions never seen a small weight instead of none. Zero
    becomes ``share · I``.

    >>> damped(torch.zeros(1, 1), 0.5).tolist()
    [[0.5]]
    """
    a = symmetric(matrix)
    a.diagonal().add_(share * scale_of(a))
    return a


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part in float64: accumulated moments are symmetric only up to rounding."""
    a = matrix.detach().double()
    return 0.5 * (a + a.T)


def square_root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite matrix, float64; negative rounding noise counts as zero."""
    values, vectors = torch.linalg.eigh(symmetric(matrix))
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def root_of(matrix: Tensor) -> Tensor:
    """R with R Rᵀ = A for a positive semidefinite A, float64: its Cholesky factor, or where A is singular to rounding
    its symmetric square root."""
    factor = cholesky(symmetric(matrix))
    return square_root(matrix) if factor is None else factor


def cholesky(matrix: Tensor) -> Tensor | None:
    """The lower factor, or None where there is none to rounding."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return None if int(info) or not bool(factor.isfinite().all()) else factor


def upper_root_of_inverse(matrix: Tensor) -> Tensor:
    """The upper U with Uᵀ U = A⁻¹ for a regular A, as one is that was damped.

    Raises:
        torch.linalg.LinAlgError: A is singular to rounding, or holds NaN or Inf.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    return torch.linalg.cholesky(inverse, upper=True)


def triangular_root(matrix: Tensor) -> Tensor:
    """A regular lower L with L Lᵀ = A, float64. A moment that is singular to rounding gets the least damping that mends
    it; one that rounding made indefinite loses its negative part. For zero it is the identity.

    Raises:
        ValueError: A holds NaN or Inf.
    """
    a = symmetric(matrix)
    if not bool(a.isfinite().all()):
        raise ValueError("a moment holds NaN or Inf, so it is not positive semidefinite")
    if not weighs(a):
        return torch.eye(len(a), dtype=a.dtype, device=a.device)
    for share in _DAMPING:
        if (factor := cholesky(damped(a, share))) is not None:
            return factor
    values, vectors = torch.linalg.eigh(a)
    values = values.clamp_min(_DAMPING[-1] * scale_of(a))
    # Q R = diag(√λ) Vᵀ gives Rᵀ R = V diag(λ) Vᵀ.
    upper = torch.linalg.qr(values.sqrt()[:, None] * vectors.T).R
    return (upper * upper.diagonal().sign()[:, None]).T
