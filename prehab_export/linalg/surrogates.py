"""Compute smooth surrogates of the rank of a whitened weight ``M = G^½ W C^½``, their gradients and proximal maps.

==========================  ==============  ================================================================
name                        R(M)            source
==========================  ==============  ================================================================
``tail``                    Σ_{i>r} σ_i²    the truncation loss itself, at the target rank
``nuclear``                 ‖M‖_*           ℓ1 of the spectrum
``stable-rank``             ‖M‖_*²/‖M‖_F²   Prehab (arXiv 2512.01980)
``spectral``                ‖M‖_F²/‖M‖_2²   classical stable rank
``stochastic-stable-rank``  ‖M‖_*²/‖M‖_F²   Prehab's stochastic trace; Lanczos quadrature (Ubaru, Chen, Saad 2017)
==========================  ==============  ================================================================

Gradients are in closed form. An evaluation costs a few matrix products: no decomposition, no autograd, no square root
of the larger moment. Each surrogate keeps an orthonormal basis of M's short side between refreshes:

- ``tail`` keeps the top r directions and follows the moving weight with one subspace iteration per evaluation. It must:
  with fixed directions, the gradient pulls W back into an old subspace. On a small ViT, 25 AdamW steps after the
  directions were computed (learning rate 3e-4, W moved by 3 to 5%), the cosine with the true gradient was between 0.65
  and 1; with the iteration, it was above 0.997 in all layers examined but one.
- ``nuclear``, ``stable-rank`` and ``spectral`` are computed from the energies of M's rows in a fixed eigenbasis
  (iteratively reweighted least squares; Q3R, arXiv 2511.04485, trains with such a basis). By Schur–Horn, a stale basis
  gives a value at or above the true one.
- The proximal maps are those of proximal low-rank training (torchao's PAT: an SVD of W every few steps), taken here
  in the metric of the loss and in the same bases.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from converters.roots import triangular_root, weighs
from prehab_export.linalg.lanczos import lanczos

# Energies below this share of the largest are rounding noise of float32. Their gradient is that of an energy of this
# size.
NOISE = 1e-7
# Random probes of a stochastic trace, and Lanczos steps per probe: they give √ to 1% on spectra over eight decades.
PROBES = 8
LANCZOS_STEPS = 24
# Random probes for the value of `Tail.shrink`: within a few percent, which suffices for display, its only use.
TAIL_PROBES = 32


@dataclass(frozen=True)
class Frame:
    """Coordinates of one weight in which the metric of its short side is the identity, float32.

    If ``wide``, X (k×l) is W, the near metric (k×k) is G and the far metric (l×l) is C; otherwise X is Wᵀ and the
    metrics change places. The coordinates of X are ``dualᵀ X``, and ``X = primal · coordinates``.
    ``coordinates · far^½`` is M (or its transpose) up to a rotation of its near side.

    dual, primal: k×k.
    far: the diagonal blocks of the far metric; None for the identity.
    """

    wide: bool
    dual: Tensor
    primal: Tensor
    far: tuple[Tensor, ...] | None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        weight: Tensor,
        second_moment: Tensor | None = None,
        gradient_moments: Sequence[Tensor] | None = None,
    ) -> "Frame":
        """Build the frame of W (m×n) in the metrics C (n×n) and G (m×m); None stands for the identity.

        Args:
            gradient_moments: the diagonal blocks of G: a single block, or one per weight if W is a stack of weights
                with one input. The near side is the shorter one; for stacked weights, it is the input side.

        Raises:
            ValueError: the near metric holds NaN or Inf.
        """
        second_moments = None if second_moment is None else (second_moment,)
        stacked = gradient_moments is not None and len(gradient_moments) > 1
        wide = weight.shape[0] <= weight.shape[1] and not stacked
        near, far = (gradient_moments, second_moments) if wide else (second_moments, gradient_moments)
        size = weight.shape[0] if wide else weight.shape[1]
        identity = torch.eye(size, dtype=torch.float64, device=weight.device)
        factor = identity if near is None else triangular_root(near[0])
        primal = torch.linalg.solve_triangular(factor.T, identity, upper=True)
        blocks = None if far is None else tuple(block.detach().float() for block in far)
        if near is not None and not weighs(near[0]):
            # A zero near metric gets identity coordinates; a zero far metric then makes their cost zero.
            sizes = [weight.shape[1] if wide else weight.shape[0]] if far is None else [len(block) for block in far]
            blocks = tuple(torch.zeros(size, size, device=weight.device) for size in sizes)
        return cls(wide, factor.float(), primal.float(), blocks)

    def rotated(self, vectors: Tensor) -> "Frame":
        """Return this frame with coordinates in the orthonormal basis ``vectors`` (k×k)."""
        return replace(self, dual=self.dual @ vectors, primal=self.primal @ vectors)

    def rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coordinates of W (k×l), and the coordinates times the far metric (k×l)."""
        rows = self.dual.T @ self.oriented(weight)
        return rows, self.times_far(rows)

    def times_far(self, rows: Tensor) -> Tensor:
        """Return ``rows · far`` for any number of rows with l columns."""
        if self.far is None:
            return rows
        parts = rows.split([len(block) for block in self.far], dim=1)
        products = [part @ block for part, block in zip(parts, self.far, strict=True)]
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    def gradient(self, derivative: Tensor) -> Tensor:
        """Return the gradient in W (m×n) of a function whose derivative in the coordinates is ``derivative`` (k×l)."""
        return self.oriented(self.dual @ derivative)

    def shifted(self, weight: Tensor, change: Tensor) -> Tensor:
        """Return W (m×n) with ``change`` (k×l) added to its coordinates."""
        return weight + self.oriented(self.primal @ change)

    def oriented(self, matrix: Tensor) -> Tensor:
        """Convert W to X, or X to W."""
        return matrix if self.wide else matrix.T


@dataclass(frozen=True)
class Whitened:
    """One weight (m×n, float32) in its frame, with its spectrum and singular directions.

    Gram matrices are formed in float32, unlike in truncation, so eigenvalues below 1e-7 of the largest are noise. This
    takes a third of the time, and is precise enough to allocate ranks and to aim at them while the weights move.
    """

    frame: Frame
    weight: Tensor

    @property
    def energy(self) -> float:
        """``‖M‖_F²``."""
        rows, rows_far = self.frame.rows(self.weight)
        return float((rows * rows_far).sum())

    @cached_property
    def _gram(self) -> Tensor:
        rows, rows_far = self.frame.rows(self.weight)
        gram = rows @ rows_far.T
        return 0.5 * (gram + gram.T)

    @cached_property
    def spectrum(self) -> Tensor:
        """The k values σ², descending, float64. Without eigenvectors they cost a fifth, and most spectra are only used
        to allocate ranks."""
        return torch.linalg.eigvalsh(self._gram).double().flip(0).clamp_min(0)

    @property
    def directions(self) -> Tensor:
        """The singular directions of M's short side in the frame's coordinates, by falling σ: k×k, float32."""
        return torch.linalg.eigh(self._gram.double())[1].flip(1).float()


class Surrogate(Protocol):
    """The surrogate of one layer, whose weight moves a little between calls."""

    def evaluate(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return value and gradient at W, both in float32; W and the gradient are m×n."""


class Proximal(Surrogate, Protocol):
    """A surrogate with a proximal map in the whitened metric."""

    def shrink(self, weight: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """Return the value at W (m×n) before the step, and W after the step; rate 0 changes nothing."""


class Tail:
    """``Σ_{i>r} σ_i²``. The proximal map divides what truncation would discard by ``1 + rate``."""

    def __init__(self, whitened: Whitened, rank: int) -> None:
        self.frame = whitened.frame
        self.top = whitened.directions[:, :rank].contiguous()
        self.probes = _probes(self.top.shape[0]).to(self.top)

    def evaluate(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows, rows_far = self._followed(weight)
        tail = rows_far - self.top @ (self.top.T @ rows_far)
        # Exact up to float32's noise in ‖M‖_F²; projecting both factors would double the cost of the iteration.
        return (rows * tail).sum().clamp_min(0), self.frame.gradient(2 * tail)

    def shrink(self, weight: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """As `Proximal.shrink`, with the value estimated by random probes of the trace (Hutchinson).

        In X itself, the map is ``X − s(X − P Qᵀ X)`` with ``s = rate / (1 + rate)``, ``P = primal · top`` and
        ``Q = dual · top``. So the far metric, whose product is the most expensive, is only multiplied by r rows.
        """
        frame, x = self.frame, self.frame.oriented(weight)
        top_far = frame.times_far((frame.dual @ self.top).T @ x)
        self.top = torch.linalg.qr(frame.dual.T @ (x @ top_far.T)).Q
        top_rows = (frame.dual @ self.top).T @ x
        probed = (frame.dual @ self.probes).T @ x - (self.top.T @ self.probes).T @ top_rows
        value = (probed * frame.times_far(probed)).sum().clamp_min(0)
        return value, frame.oriented(x.lerp((frame.primal @ self.top) @ top_rows, rate / (1 + rate)))

    def _followed(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Update the top directions by one subspace iteration and return `Frame.rows`. The Gram matrix of the
        iteration, rows · far · rowsᵀ, is never formed."""
        rows, rows_far = self.frame.rows(weight)
        self.top = torch.linalg.qr(rows @ (rows_far.T @ self.top)).Q
        return rows, rows_far


# Energies e of M's rows (σ_i² when the basis is fresh) → the surrogate's value, and its derivative in each energy.
SpectralFunction = Callable[[Tensor], tuple[Tensor, Tensor]]


class Spectral:
    """A function of the singular values, computed in a fixed eigenbasis."""

    def __init__(self, whitened: Whitened, function: SpectralFunction) -> None:
        self.frame = whitened.frame.rotated(whitened.directions)
        self.function = function

    def evaluate(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows, rows_far = self.frame.rows(weight)
        value, slope = self.function((rows * rows_far).sum(1))
        return value, self.frame.gradient(2 * slope[:, None] * rows_far)


class Nuclear(Spectral):
    """``‖M‖_*``. The proximal map reduces each singular value by ``rate`` times their initial mean, but not below 0."""

    def __init__(self, whitened: Whitened) -> None:
        super().__init__(whitened, nuclear)
        rows, rows_far = self.frame.rows(whitened.weight)
        self.mean_value = float(nuclear((rows * rows_far).sum(1))[0]) / rows.shape[0]

    def shrink(self, weight: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        rows, rows_far = self.frame.rows(weight)
        energies = (rows * rows_far).sum(1)
        value, slope = nuclear(energies)  # slope is 1/(2σ)
        scale = (1 - 2 * rate * self.mean_value * slope).clamp_min(0)
        return value, self.frame.shifted(weight, (scale - 1)[:, None] * rows)


class StochasticStableRank:
    """``‖M‖_*² / ‖M‖_F²`` from fresh random probes z per evaluation; no decomposition, not even at a refresh.

    With ``K = M Mᵀ``, ``‖M‖_* = tr K^½ ≈ mean zᵀK^½z`` and ``‖M‖_F² = tr K ≈ mean zᵀKz`` (Hutchinson). Both come from
    one Lanczos run per probe. The gradients UVᵀ and 2M are estimated with the same probes, as ``mean z(zᵀUVᵀ)`` and
    ``mean z(zᵀ2M)``: right on average, of rank ``probes``, and with noise proportional to √(k/probes).
    """

    def __init__(
        self, frame: Frame, generator: torch.Generator, probes: int = PROBES, steps: int = LANCZOS_STEPS
    ) -> None:
        self.frame, self.generator, self.probes, self.steps = frame, generator, probes, steps

    def evaluate(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        x, dual = self.frame.oriented(weight), self.frame.dual
        # Drawn on the CPU, so that a seed gives the same probes on every device.
        signs = torch.randint(0, 2, (dual.shape[0], self.probes), generator=self.generator)
        z = (2.0 * signs - 1).to(x.device)

        def far_product(v: Tensor) -> Tensor:
            """``far · coordinatesᵀ · v``: l×p."""
            return self.frame.times_far((dual @ v).T @ x).T

        def gram(v: Tensor) -> Tensor:
            """``K · v``: k×p."""
            return dual.T @ (x @ far_product(v))

        tridiagonal, vectors = lanczos(gram, z, self.steps)
        ritz, mixing = torch.linalg.eigh(tridiagonal)
        ritz = ritz.clamp_min(NOISE * ritz.amax().clamp_min(torch.finfo(ritz.dtype).tiny))
        length, first = z.norm(dim=0), mixing[:, 0]  # p, and p×steps: first components of the Ritz vectors
        norm = (length.square() * (first.square() * ritz.sqrt()).sum(1)).mean()
        energy = (length.square() * tridiagonal[:, 0, 0]).mean()
        inverse_root = torch.einsum("skp,psj,pj->kp", vectors, mixing, first * ritz.rsqrt()) * length  # K^-½ z
        value = norm.square() / energy
        projected = 2 * norm / energy * far_product(inverse_root) - 2 * value / energy * far_product(z)
        return value, self.frame.gradient(z @ projected.T / self.probes)


def nuclear(energies: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Σ √e`` and its derivative in each e.

    >>> float(nuclear(torch.tensor([9.0, 1.0]))[0])
    4.0
    """
    floor = NOISE * energies.max().clamp_min(torch.finfo(energies.dtype).tiny / NOISE)
    return energies.clamp_min(0).sqrt().sum(), 0.5 * energies.clamp_min(floor).rsqrt()


def stable_rank(energies: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(Σ √e)² / Σ e`` and its derivative in each e: 1 for rank one, the rank of M when its singular values are
    equal.

    >>> float(stable_rank(torch.tensor([4.0, 4.0]))[0])
    2.0
    """
    norm, slope = nuclear(energies)
    energy = energies.sum().clamp_min(torch.finfo(energies.dtype).tiny)
    value = norm.square() / energy
    return value, 2 * norm / energy * slope - value / energy


def spectral(energies: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Σ e / max e`` and its derivative in each e.

    >>> float(spectral(torch.tensor([4.0, 2.0]))[0])
    1.5
    """
    largest = energies.max().clamp_min(torch.finfo(energies.dtype).tiny)
    value = energies.sum() / largest
    slope = torch.ones_like(energies) / largest
    slope[energies.argmax()] -= value / largest
    return value, slope


def _probes(n: int) -> Tensor:
    """Z (n×p) with E[Z Zᵀ] = I, the same every time: ``tr A ≈ tr Zᵀ A Z``, exactly so for small n."""
    if n <= TAIL_PROBES:
        return torch.eye(n)
    signs = torch.randint(0, 2, (n, TAIL_PROBES), generator=torch.Generator().manual_seed(n))
    return (2.0 * signs - 1) / TAIL_PROBES**0.5
