"""The best rank-r factors of one weight in a whitened metric, in closed form.

Every objective is ``tr(G Δ C Δᵀ)`` with ``Δ = W − Ŵ``; they differ in which metric is the identity:

==============  ============  ==============  ===========================================
objective       C             G               known as
==============  ============  ==============  ===========================================
``weight``      identity      identity        truncated SVD
``activation``  E[x xᵀ]       identity        SVD-LLM (arXiv 2403.07378)
``fisher``      E[x xᵀ]       E[g gᵀ]         K-FAC loss increase (GFWSVD, arXiv 2505.17974)
==============  ============  ==============  ===========================================

The whitened weight is ``M = G^½ W C^½``; a Cholesky factor serves as well as the symmetric root and costs less, so
the root is left for moments that are singular to rounding. The published SVD-LLM decomposes M and solves with the
factor of C; here the smaller Gram matrix of M is diagonalised instead (Swift-SVD, arXiv 2604.01609, does so for
``activation``), and one factor follows from the other by least squares. Nothing is ever inverted but the eigenvalues
themselves, so a singular C or G needs no special case, and the discarded eigenvalues are the exact value of the
objective. A C or G of zero is taken for the identity when it comes to factors, and for zero when it comes to their
cost (see ``converters.roots``). Where few ranks of a large weight are wanted, a Krylov space gives them sooner (see
``krylov``).

Layers with one input (q, k and v; gate and up) may also share one ``down``. Stacked, they are one weight with a
block-diagonal G, and their whitened Gram matrix is ``C^½ (Σ WᵢᵀGᵢWᵢ) C^½``: that of any P with ``PᵀP = Σ WᵢᵀGᵢWᵢ``.
So the joint problem is the single one for the n×n matrix P, and neither the stack nor its G is ever formed.

Tensors in, tensors out. Shapes: W m×n (out×in), C n×n, G m×m. The eigen-step runs in float64: on the Gram matrix in
float32 it loses most of its accuracy once C is ill-conditioned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from converters.roots import cholesky, root_of, symmetric, weighs
from prehab_export.linalg import krylov
from prehab_export.linalg.gram import gram


@dataclass(frozen=True)
class Decomposition:
    """Many ranks of one weight at once: rank r is the first r columns of ``up`` and rows of ``down``.

    up: m×k, down: k×n, float64, with k = min(m, n), or the most that were asked for; spectrum: eigenvalues, descending,
    k or more; beyond: the sum of those that are not in it.
    """

    up: Tensor
    down: Tensor
    spectrum: Tensor
    beyond: float = 0.0

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """The two factors at this rank, unbalanced: up m×r, down r×n."""
        return self.up[:, :rank], self.down[:rank]

    def objective(self, rank: int) -> float:
        """Value of the objective at this rank: the discarded eigenvalues."""
        return float(self.spectrum[rank:].sum()) + self.beyond

    def objectives(self) -> Tensor:
        """`objective` at every rank from 0 to the length of the spectrum, float64."""
        return tails(self.spectrum) + self.beyond


def decompose(
    weight: Tensor,
    second_moment: Tensor | None = None,
    gradient_moment: Tensor | None = None,
    most: int | None = None,
) -> Decomposition:
    """Diagonalise the whitened weight. ``None`` stands for the identity on that side.

    Args:
        most: the highest rank that will be asked for; None for all. Where it is low against a large weight, only
            these are worked out, at objectives within 1e-6 of the least.

    >>> w = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> [round(v, 6) for v in decompose(w).spectrum.tolist()]
    [9.0, 1.0]
    >>> up, down = decompose(w).truncated(1)
    >>> torch.round(up @ down, decimals=6).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    moments = [None if moment is None else symmetric(moment) for moment in (second_moment, gradient_moment)]
    c, g = (None if moment is None or not weighs(moment) else moment for moment in moments)
    found = _decomposed(weight, c, g, most)
    free = any(moment is not None and not weighs(moment) for moment in moments)
    return replace(found, spectrum=torch.zeros_like(found.spectrum), beyond=0.0) if free else found


def _decomposed(weight: Tensor, c: Tensor | None, g: Tensor | None, most: int | None) -> Decomposition:
    if most is not None and c is not None and krylov.worthwhile(min(weight.shape), most):
        found = _leading(weight.detach(), c, g, most)
        if found is not None:
            return found
    return _all(weight.detach().double(), c, g, most)


def _all(w: Tensor, c: Tensor | None, g: Tensor | None, most: int | None) -> Decomposition:
    if w.shape[0] <= w.shape[1]:
        # Left side, with G = R Rᵀ: K = Rᵀ (W C Wᵀ) R. Given down = Uᵀ Rᵀ W, down C downᵀ is diagonal, and the best up
        # is W C downᵀ over that diagonal; with a regular G this is R^-ᵀ U, but it needs no inverse of G.
        root = None if g is None else root_of(g)
        wc = w if c is None else w @ c
        spectrum, basis = _eigh_descending(_sandwich(root, wc @ w.T))
        kept, basis = spectrum[:most], basis[:, :most]
        down = basis.T @ w if root is None else (root @ basis).T @ w
        up = basis if root is None else (wc @ down.T) * _reciprocal(spectrum)[: len(kept)]
    else:
        # Right side, mirrored, with C = R Rᵀ: K = Rᵀ (Wᵀ G W) R, up = W R V, and down by least squares in the metric G.
        root = None if c is None else root_of(c)
        gw = w if g is None else g @ w
        spectrum, basis = _eigh_descending(_sandwich(root, w.T @ gw))
        kept, basis = spectrum[:most], basis[:, :most]
        up = w @ (basis if root is None else root @ basis)
        down = basis.T if root is None else _reciprocal(spectrum)[: len(kept), None] * (up.T @ gw)
    return Decomposition(up, down, spectrum)


def _leading(w: Tensor, c: Tensor, g: Tensor | None, most: int) -> Decomposition | None:
    """The first ranks by a Krylov space; None where it does not settle them, or a moment is singular."""
    single = w.float()
    if w.shape[0] <= w.shape[1]:
        right, left = cholesky(c), None if g is None else cholesky(g)
        if right is None or (g is not None and left is None):
            return None
        half = single @ right.float()
        whitened = half if left is None else left.float().T @ half
        found = krylov.leading(whitened, None, float(whitened.square().sum(dtype=torch.float64)), most)
        if found is None:
            return None
        u = found.vectors
        up = u if left is None else torch.linalg.solve_triangular(left.T, u, upper=True)
        down = ((u if left is None else left @ u).float().T @ single).double()
    else:
        # The Gram matrix of W alone is well scaled, so float32 serves; the grading is all in the factor of C.
        right = cholesky(c)
        if right is None:
            return None
        middle = gram(single) if g is None else single.T @ (g.float() @ single)
        found = krylov.leading(right.T, middle, float((middle * c).sum()), most)
        if found is None:
            return None
        up = (single @ (right @ found.vectors).float()).double()
        down = torch.linalg.solve_triangular(right, found.vectors.T, upper=False, left=False)
    return Decomposition(up, down, found.values, found.beyond)


def predicted_loss(decomposition: Decomposition, second_moment: Tensor, gradient_moment: Tensor) -> Tensor:
    """Predicted loss increase ``½ tr(G Δ C Δᵀ)`` at every rank 0…k, whatever objective chose the factors.

    With Δ_r the sum of the dropped rank-one terms, this is half the sum over i, j > r of
    ``(upᵢᵀ G upⱼ)(downᵢ C downⱼᵀ)``: for ``fisher`` the matrix is diagonal and holds the spectrum.

    Returns:
        k+1 values, float64, for ranks 0…k.
    """
    up, down = decomposition.up, decomposition.down
    terms = (up.T @ symmetric(gradient_moment) @ up) * (down @ symmetric(second_moment) @ down.T)
    # Sum of the trailing block [r:, r:]: its diagonal plus twice what lies right of it, accumulated from the end.
    increments = terms.diagonal() + 2 * terms.triu(1).sum(1)
    return 0.5 * tails(increments).clamp_min(0)


@dataclass(frozen=True)
class JointDecomposition:
    """Many joint ranks of several weights with one input: at rank r, member i is ``ups[i][:, :r] @ down[:r]``.

    ups: mᵢ×k each, down: k×n, float64, with k = min(n, Σ mᵢ), or the most that were asked for; spectrum: eigenvalues,
    descending, k or more; beyond: the sum of those that are not in it.
    """

    ups: tuple[Tensor, ...]
    down: Tensor
    spectrum: Tensor
    beyond: float = 0.0

    def truncated(self, rank: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The factors at this rank, unbalanced: an up mᵢ×r for each member, and their down r×n."""
        return tuple(up[:, :rank] for up in self.ups), self.down[:rank]

    def objective(self, rank: int) -> float:
        """Value of the objective, summed over the members, at this rank: the discarded eigenvalues."""
        return float(self.spectrum[rank:].sum()) + self.beyond

    def objectives(self) -> Tensor:
        """`objective` at every rank from 0 to the length of the spectrum, float64."""
        return tails(self.spectrum) + self.beyond


def decompose_jointly(
    weights: Sequence[Tensor],
    second_moment: Tensor | None = None,
    gradient_moments: Sequence[Tensor] | None = None,
    most: int | None = None,
) -> JointDecomposition:
    """The best factors with one ``down`` for weights mᵢ×n, each with its Gᵢ (mᵢ×mᵢ), in the sum of their metrics.
    ``None`` stands for the identity on that side; ``most`` as in `decompose`.

    >>> w = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> joint = decompose_jointly([w, 2 * w])
    >>> [round(v, 6) for v in joint.spectrum.tolist()]
    [45.0, 5.0]
    >>> ups, down = joint.truncated(1)
    >>> torch.round(ups[1] @ down, decimals=6).tolist()
    [[6.0, 0.0], [0.0, 0.0]]
    """
    stacked = [weight.detach().double() for weight in weights]
    moments = None if gradient_moments is None else [symmetric(moment) for moment in gradient_moments]
    silent = moments is not None and not any(weighs(moment) for moment in moments)
    c = None if second_moment is None or not weighs(second_moment) else symmetric(second_moment)
    grams = moments if moments is not None and not silent else [None] * len(stacked)
    energies = (w.T @ (w if g is None else g @ w) for w, g in zip(stacked, grams, strict=True))
    single = _decomposed(root_of(reduce(torch.add, energies)).T, c, None, most)
    k = sum(w.shape[0] for w in stacked)
    down, spectrum = single.down[:k], single.spectrum[:k]
    # Given down, each best up is the least squares in C alone, whatever G: W C downᵀ over the diagonal down C downᵀ.
    seen = (down if c is None else down @ c).T * _reciprocal(spectrum)[: len(down)]
    found = JointDecomposition(tuple(w @ seen for w in stacked), down, spectrum, single.beyond)
    free = silent or (second_moment is not None and c is None)
    return replace(found, spectrum=torch.zeros_like(spectrum), beyond=0.0) if free else found


def predicted_joint_loss(
    decomposition: JointDecomposition, second_moment: Tensor, gradient_moments: Sequence[Tensor]
) -> Tensor:
    """`predicted_loss` at every joint rank 0…k, summed over the members: k+1 values, float64."""
    members = [Decomposition(up, decomposition.down, decomposition.spectrum) for up in decomposition.ups]
    pairs = zip(members, gradient_moments, strict=True)
    return torch.stack([predicted_loss(member, second_moment, gradient) for member, gradient in pairs]).sum(0)


def objective_value(delta: Tensor, second_moment: Tensor | None = None, gradient_moment: Tensor | None = None) -> float:
    """``tr(G Δ C Δᵀ)`` in float64, for Δ of shape m×n; ``None`` stands for the identity."""
    d = delta.detach().double()
    right = d if second_moment is None else d @ symmetric(second_moment)
    left = d if gradient_moment is None else symmetric(gradient_moment) @ d
    return float((left * right).sum())


def _sandwich(root: Tensor | None, inner: Tensor) -> Tensor:
    return inner if root is None else root.T @ inner @ root


def tails(values: Tensor) -> Tensor:
    """Sums of the last k, k−1, … 0 values."""
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def _eigh_descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(symmetric(matrix))
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _reciprocal(spectrum: Tensor) -> Tensor:
    """1/λ, and 0 where λ is rounding noise: such a direction carries nothing in the metric."""
    floor = spectrum[0] * spectrum.shape[0] * torch.finfo(spectrum.dtype).eps
    return torch.where(spectrum > floor, 1 / spectrum.clamp_min(torch.finfo(spectrum.dtype).tiny), 0.0)
