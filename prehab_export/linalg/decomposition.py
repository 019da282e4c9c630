"""Compute the best rank-r factors of a weight in a whitened metric, in closed form.

Every objective has the form ``tr(G Δ C Δᵀ)`` with ``Δ = W − Ŵ``. Objectives differ in which metrics are the identity:

==============  ============  ==============  ===========================================
objective       C             G               known as
==============  ============  ==============  ===========================================
``weight``      identity      identity        truncated SVD
``activation``  E[x xᵀ]       identity        SVD-LLM (arXiv 2403.07378)
``fisher``      E[x xᵀ]       E[g gᵀ]         K-FAC loss increase (GFWSVD, arXiv 2505.17974)
==============  ============  ==============  ===========================================

The whitened weight is ``M = G^½ W C^½``. A Cholesky factor serves as well as the symmetric root and costs less, so the
symmetric root is used only for moments that are singular to rounding. The published SVD-LLM decomposes M and solves
with the factor of C. Here the smaller Gram matrix of M is diagonalised instead (Swift-SVD, arXiv 2604.01609, does so
for ``activation``), and one factor follows from the other by least squares. Only the eigenvalues are ever inverted, so
a singular C or G needs no special case, and the discarded eigenvalues sum to the exact value of the objective. A C or G
of zero counts as the identity when factors are computed, and as zero when their cost is (see ``converters.roots``).
When only a few ranks of a large weight are needed, a Krylov space yields them faster (see ``krylov``).

Layers with the same input (q, k and v; gate and up) may also share one ``down``. Stacked, they are one weight with a
block-diagonal G, and their whitened Gram matrix is ``C^½ (Σ WᵢᵀGᵢWᵢ) C^½``. Any P with ``PᵀP = Σ WᵢᵀGᵢWᵢ`` has the
same one. So the joint problem is the single-weight problem for the n×n matrix P, and neither the stack nor its G is
ever formed.

Tensors in, tensors out. Shapes: W m×n (out×in), C n×n, G m×m. The eigendecomposition runs in float64: in float32, that
of a Gram matrix loses most of its accuracy once C is ill-conditioned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from converters.roots import cholesky, root_of, symmetric, weighs
from prehab_export.linalg import krylov
from prehab_export.linalg.gram_matrix import gram


@dataclass(frozen=True)
class Decomposition:
    """The factors of one weight at all ranks: rank r uses the first r columns of ``up`` and rows of ``down``.

    up: m×k, float64, with k = min(m, n) or ``max_rank``.
    down: k×n, float64.
    spectrum: the eigenvalues, descending; k or more of them.
    remainder: the sum of the eigenvalues that ``spectrum`` leaves out.
    """

    up: Tensor
    down: Tensor
    spectrum: Tensor
    remainder: float = 0.0

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the two factors at this rank, unbalanced: up m×r, down r×n."""
        return self.up[:, :rank], self.down[:rank]

    def objective(self, rank: int) -> float:
        """Return the value of the objective at this rank: the sum of the discarded eigenvalues."""
        return float(self.spectrum[rank:].sum()) + self.remainder

    def objectives(self) -> Tensor:
        """Return `objective` at every rank from 0 to the length of the spectrum, float64."""
        return tails(self.spectrum) + self.remainder


def eigenvalues(weight: Tensor, second_moment: Tensor | None = None, gradient_moment: Tensor | None = None) -> Tensor:
    """Return the spectrum of `decompose` alone: min(m, n) eigenvalues, descending, float64.

    Without factors it costs a third to a half: there are no eigenvectors.

    >>> [round(v, 6) for v in eigenvalues(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).tolist()]
    [9.0, 1.0]
    """
    moments = [None if moment is None else symmetric(moment) for moment in (second_moment, gradient_moment)]
    if any(moment is not None and not weighs(moment) for moment in moments):
        return torch.zeros(min(weight.shape), dtype=torch.float64, device=weight.device)
    return _eigenvalues_descending(_smaller_gram(weight.detach().double(), *moments)[0])


def decompose(
    weight: Tensor,
    second_moment: Tensor | None = None,
    gradient_moment: Tensor | None = None,
    max_rank: int | None = None,
) -> Decomposition:
    """Diagonalise the whitened weight. ``None`` stands for the identity on that side.

    Args:
        max_rank: the highest rank that is needed; None for all ranks. When it is low for a large weight, only
            these ranks are computed, at objectives within 1e-6 of the least.

    >>> w = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> [round(v, 6) for v in decompose(w).spectrum.tolist()]
    [9.0, 1.0]
    >>> up, down = decompose(w).truncated(1)
    >>> torch.round(up @ down, decimals=6).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    moments = [None if moment is None else symmetric(moment) for moment in (second_moment, gradient_moment)]
    c, g = (None if moment is None or not weighs(moment) else moment for moment in moments)
    decomposition = _decompose_weighing(weight, c, g, max_rank)
    costs_nothing = any(moment is not None and not weighs(moment) for moment in moments)
    if not costs_nothing:
        return decomposition
    return replace(decomposition, spectrum=torch.zeros_like(decomposition.spectrum), remainder=0.0)


def _decompose_weighing(weight: Tensor, c: Tensor | None, g: Tensor | None, max_rank: int | None) -> Decomposition:
    """`decompose` for moments that are not zero, by a Krylov space if that is faster and converges."""
    if max_rank is not None and c is not None and krylov.worthwhile(min(weight.shape), max_rank):
        leading = _decompose_leading(weight.detach(), c, g, max_rank)
        if leading is not None:
            return leading
    return _decompose_fully(weight.detach().double(), c, g, max_rank)


def _smaller_gram(w: Tensor, c: Tensor | None, g: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the smaller Gram matrix of the whitened weight, the root R of the moment on its side, and the product of W
    with the other moment.

    On the left side, of G = R Rᵀ, these are Rᵀ (W C Wᵀ) R and W C; on the right, of C = R Rᵀ, Rᵀ (Wᵀ G W) R and G W.
    """
    if w.shape[0] <= w.shape[1]:
        root = None if g is None else root_of(g)
        wc = w if c is None else w @ c
        return _sandwich(root, wc @ w.T), root, wc
    root = None if c is None else root_of(c)
    gw = w if g is None else g @ w
    return _sandwich(root, w.T @ gw), root, gw


def _decompose_fully(w: Tensor, c: Tensor | None, g: Tensor | None, max_rank: int | None) -> Decomposition:
    """Compute the whole spectrum from the smaller Gram matrix, and factors up to ``max_rank``."""
    matrix, root, product = _smaller_gram(w, c, g)
    spectrum, basis = _eigh_descending(matrix)
    used_values, basis = spectrum[:max_rank], basis[:, :max_rank]
    if w.shape[0] <= w.shape[1]:
        # With down = Uᵀ Rᵀ W, down C downᵀ is diagonal, and the best up is W C downᵀ divided by that diagonal. For a
        # regular G this equals R^-ᵀ U, but it needs no inverse of G.
        down = basis.T @ w if root is None else (root @ basis).T @ w
        up = basis if root is None else (product @ down.T) * _reciprocal(spectrum)[: len(used_values)]
    else:
        # Mirrored: up = W R V, and down by least squares in the metric G.
        up = w @ (basis if root is None else root @ basis)
        down = basis.T if root is None else _reciprocal(spectrum)[: len(used_values), None] * (up.T @ product)
    return Decomposition(up, down, spectrum)


def _decompose_leading(w: Tensor, c: Tensor, g: Tensor | None, max_rank: int) -> Decomposition | None:
    """Compute the first ranks in a Krylov space; None if it does not converge or a moment is singular."""
    single = w.float()
    if w.shape[0] <= w.shape[1]:
        c_root, g_root = cholesky(c), None if g is None else cholesky(g)
        if c_root is None or (g is not None and g_root is None):
            return None
        half_whitened = single @ c_root.float()
        whitened = half_whitened if g_root is None else g_root.float().T @ half_whitened
        leading = krylov.leading(whitened, None, float(whitened.square().sum(dtype=torch.float64)), max_rank)
        if leading is None:
            return None
        u = leading.vectors
        up = u if g_root is None else torch.linalg.solve_triangular(g_root.T, u, upper=True)
        down = ((u if g_root is None else g_root @ u).float().T @ single).double()
    else:
        # The Gram matrix of W alone is well scaled, so float32 suffices; only the factor of C is badly scaled.
        c_root = cholesky(c)
        if c_root is None:
            return None
        middle = gram(single) if g is None else single.T @ (g.float() @ single)
        leading = krylov.leading(c_root.T, middle, float((middle * c).sum()), max_rank)
        if leading is None:
            return None
        up = (single @ (c_root @ leading.vectors).float()).double()
        down = torch.linalg.solve_triangular(c_root, leading.vectors.T, upper=False, left=False)
    return Decomposition(up, down, leading.values, leading.remainder)


def predicted_loss(decomposition: Decomposition, second_moment: Tensor, gradient_moment: Tensor) -> Tensor:
    """Predict the loss increase ``½ tr(G Δ C Δᵀ)`` at every rank 0…k, whatever objective chose the factors.

    Δ_r is the sum of the dropped rank-one terms, so the value is half the sum over i, j > r of
    ``(upᵢᵀ G upⱼ)(downᵢ C downⱼᵀ)``. For ``fisher`` that matrix is diagonal and holds the spectrum.

    Returns:
        k+1 values, float64, for ranks 0…k.
    """
    up, down = decomposition.up, decomposition.down
    terms = (up.T @ symmetric(gradient_moment) @ up) * (down @ symmetric(second_moment) @ down.T)
    # The sum of the trailing block [r:, r:] is its diagonal plus twice the part right of it, accumulated from the end.
    increments = terms.diagonal() + 2 * terms.triu(1).sum(1)
    return 0.5 * tails(increments).clamp_min(0)


@dataclass(frozen=True)
class JointDecomposition:
    """The factors of several weights that share one input and one ``down``, at all joint ranks.

    At rank r, member i is ``ups[i][:, :r] @ down[:r]``.

    ups: one mᵢ×k tensor per member, float64, with k = min(n, Σ mᵢ) or ``max_rank``.
    down: k×n, float64.
    spectrum: the eigenvalues, descending; k or more of them.
    remainder: the sum of the eigenvalues that ``spectrum`` leaves out.
    """

    ups: tuple[Tensor, ...]
    down: Tensor
    spectrum: Tensor
    remainder: float = 0.0

    def truncated(self, rank: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the factors at this rank, unbalanced: one up mᵢ×r per member, and their down r×n."""
        return tuple(up[:, :rank] for up in self.ups), self.down[:rank]

    def objective(self, rank: int) -> float:
        """Return the objective at this rank, summed over the members: the sum of the discarded eigenvalues."""
        return float(self.spectrum[rank:].sum()) + self.remainder

    def objectives(self) -> Tensor:
        """Return `objective` at every rank from 0 to the length of the spectrum, float64."""
        return tails(self.spectrum) + self.remainder


def decompose_jointly(
    weights: Sequence[Tensor],
    second_moment: Tensor | None = None,
    gradient_moments: Sequence[Tensor] | None = None,
    max_rank: int | None = None,
) -> JointDecomposition:
    """Compute the best factors with one ``down`` for weights mᵢ×n, each with its Gᵢ (mᵢ×mᵢ), in the sum of their
    metrics. ``None`` stands for the identity on that side; ``max_rank`` as in `decompose`.

    >>> w = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> joint = decompose_jointly([w, 2 * w])
    >>> [round(v, 6) for v in joint.spectrum.tolist()]
    [45.0, 5.0]
    >>> ups, down = joint.truncated(1)
    >>> torch.round(ups[1] @ down, decimals=6).tolist()
    [[6.0, 0.0], [0.0, 0.0]]
    """
    doubles = [weight.detach().double() for weight in weights]
    moments = None if gradient_moments is None else [symmetric(moment) for moment in gradient_moments]
    gradients_zero = moments is not None and not any(weighs(moment) for moment in moments)
    c = None if second_moment is None or not weighs(second_moment) else symmetric(second_moment)
    metrics = moments if moments is not None and not gradients_zero else [None] * len(doubles)
    single = _decompose_weighing(root_of(_energy(doubles, metrics)).T, c, None, max_rank)
    k = sum(w.shape[0] for w in doubles)
    down, spectrum = single.down[:k], single.spectrum[:k]
    # For a fixed down, each best up is least squares in C alone, whatever G is: W C downᵀ divided by the diagonal of
    # down C downᵀ.
    pseudo_inverse = (down if c is None else down @ c).T * _reciprocal(spectrum)[: len(down)]
    joint = JointDecomposition(tuple(w @ pseudo_inverse for w in doubles), down, spectrum, single.remainder)
    costs_nothing = gradients_zero or (second_moment is not None and c is None)
    return replace(joint, spectrum=torch.zeros_like(spectrum), remainder=0.0) if costs_nothing else joint


def joint_eigenvalues(
    weights: Sequence[Tensor],
    second_moment: Tensor | None = None,
    gradient_moments: Sequence[Tensor] | None = None,
) -> Tensor:
    """Return the spectrum of `decompose_jointly` alone: min(n, Σ mᵢ) eigenvalues, descending, float64.

    >>> w = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> [round(v, 6) for v in joint_eigenvalues([w, 2 * w]).tolist()]
    [45.0, 5.0]
    """
    k = min(weights[0].shape[1], sum(weight.shape[0] for weight in weights))
    gradients = [None] * len(weights) if gradient_moments is None else list(map(symmetric, gradient_moments))
    c = None if second_moment is None else symmetric(second_moment)
    if (c is not None and not weighs(c)) or all(g is not None and not weighs(g) for g in gradients):
        return torch.zeros(k, dtype=torch.float64, device=weights[0].device)
    energy = _energy([weight.detach().double() for weight in weights], gradients)
    return _eigenvalues_descending(_sandwich(None if c is None else root_of(c), energy))[:k]


def predicted_joint_loss(
    decomposition: JointDecomposition, second_moment: Tensor, gradient_moments: Sequence[Tensor]
) -> Tensor:
    """Sum `predicted_loss` over the members at every joint rank 0…k: k+1 values, float64."""
    members = [Decomposition(up, decomposition.down, decomposition.spectrum) for up in decomposition.ups]
    pairs = zip(members, gradient_moments, strict=True)
    return torch.stack([predicted_loss(member, second_moment, gradient) for member, gradient in pairs]).sum(0)


def objective_value(delta: Tensor, second_moment: Tensor | None = None, gradient_moment: Tensor | None = None) -> float:
    """Compute ``tr(G Δ C Δᵀ)`` in float64 for Δ of shape m×n; ``None`` stands for the identity."""
    d = delta.detach().double()
    dc = d if second_moment is None else d @ symmetric(second_moment)
    gd = d if gradient_moment is None else symmetric(gradient_moment) @ d
    return float((gd * dc).sum())


def _energy(weights: Sequence[Tensor], gradient_moments: Sequence[Tensor | None]) -> Tensor:
    """``Σ WᵢᵀGᵢWᵢ`` (n×n)."""
    pairs = zip(weights, gradient_moments, strict=True)
    return reduce(torch.add, (w.T @ (w if g is None else g @ w) for w, g in pairs))


def _sandwich(root: Tensor | None, inner: Tensor) -> Tensor:
    """``Rᵀ A R``."""
    return inner if root is None else root.T @ inner @ root


def tails(values: Tensor) -> Tensor:
    """Return the sums of the last k, k−1, … 0 of k values.

    >>> tails(torch.tensor([3.0, 2.0, 1.0])).tolist()
    [6.0, 3.0, 1.0, 0.0]
    """
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def _eigenvalues_descending(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(symmetric(matrix)).flip(0).clamp_min(0)


def _eigh_descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(symmetric(matrix))
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _reciprocal(spectrum: Tensor) -> Tensor:
    """1/λ, or 0 where λ is rounding noise: such a direction weighs nothing in the metric."""
    floor = spectrum[0] * spectrum.shape[0] * torch.finfo(spectrum.dtype).eps
    return torch.where(spectrum > floor, 1 / spectrum.clamp_min(torch.finfo(spectrum.dtype).tiny), 0.0)
