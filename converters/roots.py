"""Compute roots of symmetric positive semidefinite matrices, robust to rounding, and define what a zero moment means.

A zero moment means that nothing passes on that side: the layer's input is always 0 (or constant, if the bias absorbs
the mean), or its output has no effect on the loss. Any factors are then equally good and cost nothing. So the factors
are computed with the identity in place of the moment: they are finite, the same every time, and the best guess in case
something passes one day. Their cost is 0. `weighs` decides whether a moment counts as zero, and `damped` keeps matrices
regular before they are inverted.

Tensors in, tensors out; float64.
"""

import torch
from torch import Tensor

# Dampings, as shares of the mean diagonal, that are tried in turn until a matrix has a triangular factor.
_DAMPING = (0.0, 1e-8, 1e-6, 1e-4)


def weighs(moment: Tensor) -> bool:
    """Whether a moment (n×n) weighs anything; if not, it is zero to rounding."""
    return bool(moment.diagonal().sum(dtype=torch.float64) > 0)


def scale_of(moment: Tensor) -> Tensor:
    """Return the mean of the diagonal, of which dampings are a share; 1 for a moment that weighs nothing."""
    mean = moment.diagonal().double().mean()
    return mean if weighs(moment) else torch.ones_like(mean)


def damped(matrix: Tensor, share: float) -> Tensor:
    """Return ``A + share · mean(diag A) · I``, float64, so that unseen directions have a small weight instead of none.
    A zero matrix becomes ``share · I``.

    >>> damped(torch.zeros(1, 1), 0.5).tolist()
    [[0.5]]
    """
    a = symmetric(matrix)
    a = a.clone() if a.data_ptr() == matrix.data_ptr() else a
    a.diagonal().add_(share * scale_of(a))
    return a


def symmetric(matrix: Tensor) -> Tensor:
    """Return the symmetric part in float64; accumulated moments are only symmetric up to rounding.

    What is symmetric in float64 already is returned as it is, since a copy of the moments of a large layer takes a
    gigabyte. So the result must not be changed in place.
    """
    a = matrix.detach()
    if a.dtype == torch.float64 and torch.equal(a, a.T):
        return a
    a = a.double()
    return (a + a.T).mul_(0.5)


def square_root(matrix: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semidefinite matrix, float64; negative rounding noise counts as
    zero."""
    values, vectors = torch.linalg.eigh(symmetric(matrix))
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def root_of(matrix: Tensor) -> Tensor:
    """Return R with R Rᵀ = A for a positive semidefinite A, float64: the Cholesky factor, or the symmetric square root
    if A is singular to rounding."""
    factor = cholesky(symmetric(matrix))
    return square_root(matrix) if factor is None else factor


def cholesky(matrix: Tensor) -> Tensor | None:
    """Return the lower Cholesky factor, or None if the matrix is not positive definite to rounding."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return None if int(info) or not bool(factor.isfinite().all()) else factor


def upper_root_of_inverse(matrix: Tensor) -> Tensor:
    """Return the upper triangular U with Uᵀ U = A⁻¹ for a regular A, such as a damped matrix.

    Raises:
        torch.linalg.LinAlgError: A is singular to rounding, or holds NaN or Inf.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    return torch.linalg.cholesky(inverse, upper=True)


def triangular_root(matrix: Tensor) -> Tensor:
    """Return a regular lower triangular L with L Lᵀ = A, float64.

    If A is singular to rounding, it gets the least damping that makes it regular. If rounding made it indefinite, it
    loses its negative part. For a zero A, L is the identity.

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
