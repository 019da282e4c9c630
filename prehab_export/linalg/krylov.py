"""The leading eigenvectors of a large Gram matrix from a block Krylov space, in float32 with float64 Rayleigh–Ritz.

Truncation to a rank far below full needs the leading eigenvectors only. Block Lanczos with full reorthogonalisation
(Golub and Underwood, 1977; the eigenvalue bounds are Saad's, SIAM J. Numer. Anal. 17, 1980) spans them, up to rounding,
in a space somewhat larger than their number, at the cost of as many products of the matrix with a vector: matrix
products throughout, where a full eigen- or singular value decomposition spends its time reading memory.

The matrix is given as ``K = F A Fᵀ`` and never formed, so that float32 costs accuracy in proportion to the square root
of its condition and not to the condition. The space it spans is then searched in float64. How much a larger space
could still gain is estimated from the residuals; where that is not next to nothing, there is no answer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from converters.roots import cholesky, symmetric

BLOCK = 32
# Blocks beyond the eigenvectors asked for: at first, and more at a time where that was not enough. A block is one
# degree of the polynomial that separates wanted from unwanted eigenvalues.
FIRST_BLOCKS, MORE_BLOCKS = 18, 8
# Spaces beyond this share of the full one save nothing worth having over the full decomposition.
LARGEST_SHARE = 0.65
# What is still to be gained, as a share of the discarded energy. What is found is far below this estimate.
TOLERANCE = 1e-6
# More blocks have to cut the estimate to this share: where eigenvalues lie close they do not, and are not worth it.
PROGRESS = 0.1
# Below this share of the whole energy, float32 cannot tell the discarded part well enough to judge convergence.
RESOLVED = 1e-5


@dataclass(frozen=True)
class Leading:
    """values: the leading eigenvalues, descending; vectors: s×most, orthonormal; beyond: the sum of all others, which
    float32 resolves to about 1e-7 of the trace. float64."""

    values: Tensor
    vectors: Tensor
    beyond: float


def worthwhile(size: int, most: int) -> bool:
    """Whether the Krylov space for ``most`` eigenvectors is small against the whole.

    >>> worthwhile(4096, 819), worthwhile(4096, 2985), worthwhile(768, 153)
    (True, False, False)
    """
    return most + FIRST_BLOCKS * BLOCK <= LARGEST_SHARE * size


def leading(factor: Tensor, middle: Tensor | None, trace: float, most: int, seed: int = 0) -> Leading | None:
    """The first ``most`` eigenpairs of ``F A Fᵀ``; None where they do not converge, or float32 cannot tell.

    Args:
        factor: F, s×l.
        middle: A, l×l, symmetric positive semidefinite; None for the identity.
        trace: of F A Fᵀ.
        seed: of the vectors the space starts from.
    """
    space = _Space(factor.float(), None if middle is None else middle.float(), seed)
    size, bound = most + FIRST_BLOCKS * BLOCK, float("inf")
    while size <= LARGEST_SHARE * factor.shape[0]:
        space.grow(size)
        values, mixing, residuals = space.ritz()
        beyond = trace - float(values[:most].sum())
        gain = _gain(values, residuals, most)
        if beyond < RESOLVED * trace or gain > PROGRESS * bound:
            return None
        if gain <= TOLERANCE * beyond:
            vectors = _orthonormal(space.basis.T @ mixing[:, :most].float())
            return Leading(values[:most].clamp_min(0), vectors, beyond)
        size, bound = size + MORE_BLOCKS * BLOCK, gain
    return None


class _Space:
    """A growing Krylov space: rows q of its orthonormal ``basis``, and with them q F and q F A."""

    def __init__(self, factor: Tensor, middle: Tensor | None, seed: int) -> None:
        self.factor, self.middle = factor, middle
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(BLOCK, factor.shape[0], generator=generator).to(factor.device)
        self.basis = factor.new_empty(0, factor.shape[0])
        self.seen = self.weighed = factor.new_empty(0, factor.shape[1])
        self.following = start  # what the next block is made of

    def grow(self, size: int) -> None:
        """Whole blocks, to at least this size."""
        blocks, total = [(self.seen, self.weighed)], -(-size // BLOCK) * BLOCK
        held = self.factor.new_empty(total, self.factor.shape[0])
        count = len(self.basis)
        held[:count] = self.basis
        while count < total:
            new = held[count : count + BLOCK]
            # Twice, for rounding: what is left of a block after the first pass may be small.
            new.copy_(_orthonormal(self.following.T).T)
            new.copy_(_orthonormal(_without(new, held[:count]).T).T)
            count += BLOCK
            seen = new @ self.factor
            weighed = seen if self.middle is None else seen @ self.middle
            blocks.append((seen, weighed))
            self.following = _without(weighed @ self.factor.T, held[:count])
        self.basis = held
        self.seen = torch.cat([seen for seen, _ in blocks])
        self.weighed = self.seen if self.middle is None else torch.cat([weighed for _, weighed in blocks])

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values, descending, their vectors in the basis and the norms of their residuals; float64."""
        projected = self.seen.double() @ self.weighed.double().T
        values, mixing = torch.linalg.eigh(symmetric(projected))
        values, mixing = values.flip(0), mixing.flip(1)
        # K of a Ritz vector leaves the space through the last block only.
        return values, mixing, (self.following.double().T @ mixing[-BLOCK:]).norm(dim=0)


def _gain(values: Tensor, residuals: Tensor, most: int) -> float:
    """What the kept energy may still gain: with residual ρ and gap g to the first discarded Ritz value, each kept
    value rises by at most about the lesser of ρ²/g and ρ."""
    gap = (values[:most] - values[most]).clamp_min(torch.finfo(values.dtype).tiny)
    kept = residuals[:most]
    return float(torch.minimum(kept, kept.square() / gap).sum())


def _without(rows: Tensor, basis: Tensor) -> Tensor:
    return rows - (rows @ basis.T) @ basis


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns with the same leading spans, float64: Cholesky QR, or Householder where that breaks down."""
    wide = columns.double()
    factor = cholesky(wide.T @ wide)
    if factor is None:
        return torch.linalg.qr(wide).Q
    return torch.linalg.solve_triangular(factor.T, wide, upper=True, left=False)
