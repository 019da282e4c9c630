"""Compute the leading eigenvectors of a large Gram matrix in a block Krylov space.

Truncation to a rank far below full needs only the leading eigenvectors. Block Lanczos with full reorthogonalisation
(Golub and Underwood, 1977; the eigenvalue bounds are Saad's, SIAM J. Numer. Anal. 17, 1980) finds a space that contains
them up to rounding and has somewhat more dimensions than there are eigenvectors. It costs one product of the matrix
with a vector per dimension. These are matrix products throughout, whereas a full eigenvalue or singular value
decomposition spends its time reading memory.

The matrix is given as ``K = F A Fᵀ`` and never formed, so the accuracy lost to float32 grows with the square root of
its condition number, not with the condition number. The space is built in float32 and then searched in float64
(Rayleigh–Ritz). The residuals show how much a larger space could still gain; if that is more than next to nothing, no
result is returned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from converters.roots import cholesky, symmetric

BLOCK = 32
# Blocks beyond the requested eigenvectors: at first, and per extension if those were not enough. Each block adds one
# degree to the polynomial that separates the leading eigenvalues from the others.
FIRST_BLOCKS, MORE_BLOCKS = 18, 8
# A space beyond this share of the full one saves nothing worthwhile over the full decomposition.
LARGEST_SHARE = 0.65
# The largest accepted estimate of what is still to be gained, as a share of the discarded energy. The true gain is far
# below the estimate.
TOLERANCE = 1e-6
# An extension has to cut the estimate to this share. Where eigenvalues lie close together it does not, and is not worth
# its cost.
PROGRESS = 0.1
# If the discarded part is below this share of the whole energy, float32 cannot resolve it well enough to judge
# convergence.
RESOLVED = 1e-5


@dataclass(frozen=True)
class Leading:
    """The leading eigenpairs of an s×s matrix, float64.

    values: k eigenvalues, descending.
    vectors: s×k, orthonormal.
    remainder: the sum of all other eigenvalues, which float32 resolves to about 1e-7 of the trace.
    """

    values: Tensor
    vectors: Tensor
    remainder: float


def worthwhile(size: int, count: int) -> bool:
    """Whether the Krylov space for ``count`` eigenvectors is small compared with the whole space.

    >>> worthwhile(4096, 819), worthwhile(4096, 2985), worthwhile(768, 153)
    (True, False, False)
    """
    return count + FIRST_BLOCKS * BLOCK <= LARGEST_SHARE * size


def leading(factor: Tensor, middle: Tensor | None, trace: float, count: int, seed: int = 0) -> Leading | None:
    """Compute the first ``count`` eigenpairs of ``F A Fᵀ``; None if they do not converge or float32 cannot tell.

    Args:
        factor: F, s×l.
        middle: A, l×l, symmetric positive semidefinite; None for the identity.
        trace: the trace of F A Fᵀ.
        seed: seed of the random vectors that the space starts from.
    """
    space = _Space(factor.float(), None if middle is None else middle.float(), seed)
    size, last_gain = count + FIRST_BLOCKS * BLOCK, float("inf")
    while size <= LARGEST_SHARE * factor.shape[0]:
        space.grow(size)
        values, mixing, residuals = space.ritz()
        remainder = trace - float(values[:count].sum())
        gain = _possible_gain(values, residuals, count)
        if remainder < RESOLVED * trace or gain > PROGRESS * last_gain:
            return None
        if gain <= TOLERANCE * remainder:
            vectors = _orthonormal(space.basis.T @ mixing[:, :count].float())
            return Leading(values[:count].clamp_min(0), vectors, remainder)
        size, last_gain = size + MORE_BLOCKS * BLOCK, gain
    return None


class _Space:
    """A growing Krylov space: the rows q of its orthonormal ``basis``, with q F in ``qf`` and q F A in ``qfa``."""

    def __init__(self, factor: Tensor, middle: Tensor | None, seed: int) -> None:
        self.factor, self.middle = factor, middle
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(BLOCK, factor.shape[0], generator=generator).to(factor.device)
        self.basis = factor.new_empty(0, factor.shape[0])
        self.qf = self.qfa = factor.new_empty(0, factor.shape[1])
        self.next_rows = start  # the next block, before it is orthonormalised

    def grow(self, size: int) -> None:
        """Add whole blocks until the space has at least this many dimensions."""
        blocks, total = [(self.qf, self.qfa)], -(-size // BLOCK) * BLOCK
        basis = self.factor.new_empty(total, self.factor.shape[0])
        count = len(self.basis)
        basis[:count] = self.basis
        while count < total:
            block = basis[count : count + BLOCK]
            # Orthonormalised twice because of rounding: the first pass may leave only a small part of a block.
            block.copy_(_orthonormal(self.next_rows.T).T)
            block.copy_(_orthonormal(_without(block, basis[:count]).T).T)
            count += BLOCK
            qf = block @ self.factor
            qfa = qf if self.middle is None else qf @ self.middle
            blocks.append((qf, qfa))
            self.next_rows = _without(qfa @ self.factor.T, basis[:count])
        self.basis = basis
        self.qf = torch.cat([qf for qf, _ in blocks])
        self.qfa = self.qf if self.middle is None else torch.cat([qfa for _, qfa in blocks])

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the Ritz values, descending, the Ritz vectors in the basis, and the residual norms; float64."""
        projected = self.qf.double() @ self.qfa.double().T
        values, mixing = torch.linalg.eigh(symmetric(projected))
        values, mixing = values.flip(0), mixing.flip(1)
        # K maps a Ritz vector out of the space through the last block only.
        return values, mixing, (self.next_rows.double().T @ mixing[-BLOCK:]).norm(dim=0)


def _possible_gain(values: Tensor, residuals: Tensor, count: int) -> float:
    """Estimate how much energy the first ``count`` Ritz values may still gain: with residual ρ and gap g to the next
    Ritz value, each of them rises by at most about the lesser of ρ²/g and ρ."""
    gap = (values[:count] - values[count]).clamp_min(torch.finfo(values.dtype).tiny)
    rho = residuals[:count]
    return float(torch.minimum(rho, rho.square() / gap).sum())


def _without(rows: Tensor, basis: Tensor) -> Tensor:
    """The part of ``rows`` that is orthogonal to the rows of ``basis``."""
    return rows - (rows @ basis.T) @ basis


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns with the same leading spans, float64: by Cholesky QR, or Householder if that breaks down."""
    doubles = columns.double()
    factor = cholesky(doubles.T @ doubles)
    if factor is None:
        return torch.linalg.qr(doubles).Q
    return torch.linalg.solve_triangular(factor.T, doubles, upper=True, left=False)
