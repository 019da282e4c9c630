"""Smooth stand-ins for the rank of a whitened weight ``M = G^½ W C^½``, with closed-form gradients and proximal maps.

==========================  ==============  ================================================================
name                        R(M)            source
==========================  ==============  ================================================================
``tail``                    Σ_{i>r} σ_i²    the truncation loss itself, at the target rank
``nuclear``                 ‖M‖_*           ℓ1 of the spectrum
``stable-rank``             ‖M‖_*²/‖M‖_F²   Prehab (arXiv 2512.01980)
``spectral``                ‖M‖_F²/‖M‖_2²   classical stable rank
``stochastic-stable-rank``  ‖M‖_*²/‖M‖_F²   Prehab's stochastic trace; Lanczos quadrature (Ubaru, Chen, Saad 2017)
==========================  ==============  ================================================================

An evaluation costs a few matrix products: no decomposition, no autograd, no square root of the larger moment. Each
surrogate holds an orthonormal basis of M's short side between refreshes, and treats it as it needs:

- ``tail`` holds the top r directions and follows the moving weight with one subspace iteration an evaluation. It must:
  held still they make a gradient that pulls W back into an old subspace. On a small ViT, 25 AdamW steps (3e-4, W moved
  by 3 to 5%) after they were taken, its cosine with the true gradient lay between 0.65 and 1; with the iteration above
  0.997 in all layers looked at but one.
- ``nuclear``, ``stable-rank`` and ``spectral`` are read off the energies of M's rows in a held eigenbasis (iteratively
  reweighted least squares; Q3R, arXiv 2511.04485, trains with such a basis). By Schur–Horn a stale basis gives a
  value at or above the true one.
- the proximal maps are those of proximal low-rank training (torchao's PAT: an SVD of W every few steps), taken here
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

# Energies below this share of the largest are rounding noise of float32: they pull with the force of this one.
NOISE = 1e-7
# Random probes of a stochastic trace, and Lanczos steps behind each: √ to 1% on spectra over eight decades.
PROBES = 8
LANCZOS_STEPS = 24
# Of a tail that shrinks: its value is within a few percent, which is for the eye alone.
TAIL_PROBES = 32


@dataclass(frozen=True)
class Frame:
    """Coordinates of one weight in which the near metric is the identity, float32.

    X is W and the far metric C when ``wide``, else Wᵀ and G: k×l. The coordinates of X are ``dualᵀ X``, and
    ``X = primal · coordinates``; dual and primal are k×k. far: the diagonal blocks of an l×l matrix, None for the
    identity. ``coordinates · far^½`` is M (or its transpose) up to a rotation of its near side.
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
        """The frame of W (m×n) in the metrics C (n×n) and G (m×m); None stands for the identity.

        Args:
            gradient_moments: the diagonal blocks of G: one, or one for each of the weights with one input that are
                stacked in W. The near side is the shorter one; of stacked weights, that of their input.

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
            # Coordinates have to be some; that they cost nothing is then said on the other side.
            sizes = [weight.shape[1] if wide else weight.shape[0]] if far is None else [len(block) for block in far]
            blocks = tuple(torch.zeros(size, size, device=weight.device) for size in sizes)
        return cls(wide, factor.float(), primal.float(), blocks)

    def rotated(self, vectors: Tensor) -> "Frame":
        """The same coordinates in the orthonormal basis ``vectors`` (k×k)."""
        return replace(self, dual=self.dual @ vectors, primal=self.primal @ vectors)

    def rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of W (k×l), and the same times the far metric."""
        rows = self.dual.T @ self.oriented(weight)
        return rows, self.moved(rows)

    def moved(self, rows: Tensor) -> Tensor:
        """``rows · far``, for rows of l columns."""
        if self.far is None:
            return rows
        parts = rows.split([len(block) for block in self.far], dim=1)
        products = [part @ block for part, block in zip(parts, self.far, strict=True)]
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    def gradient(self, moved: Tensor) -> Tensor:
        """The gradient in W (m×n) of a function with derivative ``moved`` (k×l) in the coordinates."""
        return self.oriented(self.dual @ moved)

    def shifted(self, weight: Tensor, change: Tensor) -> Tensor:
        """W (m×n) with its coordinates changed by ``change`` (k×l)."""
        return weight + self.oriented(self.primal @ change)

    def oriented(self, matrix: Tensor) -> Tensor:
        """W as X, or X as W."""
        return matrix if self.wide else matrix.T


@dataclass(frozen=True)
class Whitened:
    """One weight (m×n, float32) in its frame, and what its spectrum and directions were when this was made.

    Gram matrices are formed in float32, which a layer's truncation would not do: eigenvalues below 1e-7 of the largest
    are noise. It takes a third of the time, and serves to share out ranks and to aim at them while the weights move.
    """

    frame: Frame
    weight: Tensor

    @property
    def energy(self) -> float:
        """``‖M‖_F²``."""
        rows, moved = self.frame.rows(self.weight)
        return float((rows * moved).sum())

    @cached_property
    def _gram(self) -> Tensor:
        rows, moved = self.frame.rows(self.weight)
        gram = rows @ moved.T
        return 0.5 * (gram + gram.T)

    @cached_property
    def spectrum(self) -> Tensor:
        """σ², descending, float64 (k). Eigenvalues alone cost a fifth of what they cost with their vectors, and most
        spectra are only looked at to share out ranks."""
        return torch.linalg.eigvalsh(self._gram).double().flip(0).clamp_min(0)

    @property
    def directions(self) -> Tensor:
        """The singular directions of M's short side, in the frame's coordinates, by falling σ: k×k, float32."""
        return torch.linalg.eigh(self._gram.double())[1].flip(1).float()


class Surrogate(Protocol):
    """One layer's surrogate, for a weight that moves a little between calls."""

    def evaluate(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient at W, both in float32; W and the gradient are m×n."""


class Proximal(Surrogate, Protocol):
    """A surrogate with a proximal map in the whitened metric."""

    def shrink(self, weight: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """Value at W (m×n) before the step, and W after it; rate 0 changes nothing."""


class Tail:
    """``Σ_{i>r} σ_i²``. The proximal map divides what truncation would discard by ``1 + rate``."""

    def __init__(self, whitened: Whitened, rank: int) -> None:
        self.frame = whitened.frame
        self.top = whitened.directions[:, :rank].contiguous()
        self.probes = _probes(self.top.shape[0]).to(self.top)

    def evaluate(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows, moved = self._followed(weight)
        rest = moved - self.top @ (self.top.T @ moved)
        # Right to float32's noise in ‖M‖_F²; projecting both factors would cost as much again as following does.
        return (rows * rest).sum().clamp_min(0), self.frame.gradient(2 * rest)

    def shrink(self, weight: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """As `Proximal.shrink`, the value estimated by random probes z of the trace (Hutchinson).

        In X itself the map is ``X − s(X − P Qᵀ X)`` with ``s = rate / (1 + rate)``, ``P = primal · top`` and
        ``Q = dual · top``, so that the far metric, the dearest product, is only ever multiplied by r rows.
        """
        frame, x = self.frame, self.frame.oriented(weight)
        seen = frame.moved((frame.dual @ self.top).T @ x)
        self.top = torch.linalg.qr(frame.dual.T @ (x @ seen.T)).Q
        kept = (frame.dual @ self.top).T @ x
        probed = (frame.dual @ self.probes).T @ x - (self.top.T @ self.probes).T @ kept
        value = (probed * frame.moved(probed)).sum().clamp_min(0)
        return value, frame.oriented(x.lerp((frame.primal @ self.top) @ kept, rate / (1 + rate)))

    def _followed(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of W and the same times the far metric, after one subspace iteration with their Gram matrix
        rows · far · rowsᵀ (which is never formed)."""
        rows, moved = self.frame.rows(weight)
        self.top = torch.linalg.qr(rows @ (moved.T @ self.top)).Q
        return rows, moved


# Energies e of M's rows (σ_i² when the basis is fresh) → the surrogate's value and its derivative in each energy.
SpectralFunction = Callable[[Tensor], tuple[Tensor, Tensor]]


class Spectral:
    """A function of the singular values, read off a held eigenbasis."""

    def __init__(self, whitened: Whitened, function: SpectralFunction) -> None:
        self.frame = whitened.frame.rotated(whitened.directions)
        self.function = function

    def evaluate(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows, moved = self.frame.rows(weight)
        value, slope = self.function((rows * moved).sum(1))
        return value, self.frame.gradient(2 * slope[:, None] * moved)


class Nuclear(Spectral):
    """``‖M‖_*``. The proximal map takes ``rate`` times the mean singular value at the start off each, down to 0."""

    def __init__(self, whitened: Whitened) -> None:
        super().__init__(whitened, nuclear)
        rows, moved = self.frame.rows(whitened.weight)
        self.unit = float(nuclear((rows * moved).sum(1))[0]) / rows.shape[0]

    def shrink(self, weight: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        rows, moved = self.frame.rows(weight)
        energies = (rows * moved).sum(1)
        value, slope = nuclear(energies)  # slope is 1/(2σ)
        kept = (1 - 2 * rate * self.unit * slope).clamp_min(0)
        return value, self.frame.shifted(weight, (kept - 1)[:, None] * rows)


class StochasticStableRank:
    """``‖M‖_*² / ‖M‖_F²`` from fresh random probes z at each evaluation; no decomposition, not even at a refresh.

    With ``K = M Mᵀ``: ``‖M‖_* = tr K^½ ≈ mean zᵀK^½z`` and ``‖M‖_F² = tr K ≈ mean zᵀKz`` (Hutchinson), both by one
    Lanczos run a probe. The gradients UVᵀ and 2M are seen through the same probes, ``mean z(zᵀUVᵀ)`` and
    ``mean z(zᵀ2M)``: right on average, of rank ``probes``, and noisy in proportion to √(k/probes).
    """

    def __init__(
        self, frame: Frame, generator: torch.Generator, probes: int = PROBES, steps: int = LANCZOS_STEPS
    ) -> None:
        self.frame, self.generator, self.probes, self.steps = frame, generator, probes, steps

    def evaluate(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        x, dual = self.frame.oriented(weight), self.frame.dual
        # Drawn on the CPU, so that a seed means the same on every device.
        signs = torch.randint(0, 2, (dual.shape[0], self.probes), generator=self.generator)
        z = (2.0 * signs - 1).to(x.device)

        def carried(v: Tensor) -> Tensor:
            """``far · coordinatesᵀ · v``: l×p."""
            return self.frame.moved((dual @ v).T @ x).T

        def gram(v: Tensor) -> Tensor:
            return dual.T @ (x @ carried(v))

        tridiagonal, vectors = lanczos(gram, z, self.steps)
        ritz, mixing = torch.linalg.eigh(tridiagonal)
        ritz = ritz.clamp_min(NOISE * ritz.amax().clamp_min(torch.finfo(ritz.dtype).tiny))
        length, first = z.norm(dim=0), mixing[:, 0]  # p, and p×steps: first components of the Ritz vectors
        norm = (length.square() * (first.square() * ritz.sqrt()).sum(1)).mean()
        energy = (length.square() * tridiagonal[:, 0, 0]).mean()
        inverse_root = torch.einsum("skp,psj,pj->kp", vectors, mixing, first * ritz.rsqrt()) * length  # K^-½ z
        value = norm.square() / energy
        pulled = 2 * norm / energy * carried(inverse_root) - 2 * value / energy * carried(z)
        return value, self.frame.gradient(z @ pulled.T / self.probes)


def nuclear(energies: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ √e``.

    >>> float(nuclear(torch.tensor([9.0, 1.0]))[0])
    4.0
    """
    floor = NOISE * energies.max().clamp_min(torch.finfo(energies.dtype).tiny / NOISE)
    return energies.clamp_min(0).sqrt().sum(), 0.5 * energies.clamp_min(floor).rsqrt()


def stable_rank(energies: Tensor) -> tuple[Tensor, Tensor]:
    """``(Σ √e)² / Σ e``: 1 for rank one, rank M when all its singular values are equal.

    >>> float(stable_rank(torch.tensor([4.0, 4.0]))[0])
    2.0
    """
    norm, slope = nuclear(energies)
    energy = energies.sum().clamp_min(torch.finfo(energies.dtype).tiny)
    value = norm.square() / energy
    return value, 2 * norm / energy * slope - value / energy


def spectral(energies: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ e / max e``.

    >>> float(spectral(torch.tensor([4.0, 2.0]))[0])
    1.5
    """
    largest = energies.max().clamp_min(torch.finfo(energies.dtype).tiny)
    value = energies.sum() / largest
    slope = torch.ones_like(energies) / largest
    slope[energies.argmax()] -= value / largest
    return value, slope


def _probes(n: int) -> Tensor:
    """Z (n×p) with E[Z Zᵀ] = I, the same every time: ``tr A ≈ tr Zᵀ A Z``, exactly where n is small."""
    if n <= TAIL_PROBES:
        return torch.eye(n)
    signs = torch.randint(0, 2, (n, TAIL_PROBES), generator=torch.Generator().manual_seed(n))
    return (2.0 * signs - 1) / TAIL_PROBES**0.5
