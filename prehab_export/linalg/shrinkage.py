"""Estimate how far a sampled second moment can be trusted, and shrink it towards a multiple of the identity.

Ledoit and Wolf (2004, J. Multivariate Analysis 88, 365–411) mix the sample moment with ``μI``, ``μ = tr(Ĉ)/n``:
``(1 − ρ)Ĉ + ρμI``. The expected Frobenius error is least at ``ρ* = E‖Ĉ − C‖² / E‖Ĉ − μI‖²``. The denominator can be
read off the sample; the numerator is the sampling error of Ĉ. Their estimate of it assumes independent rows. Tokens of
one sample are not independent, but samples are. Let ``S_i = Σ_t x_t x_tᵀ`` over the rows of sample i, and let ``s_i``
be its size. The moment is the ratio ``Ĉ = Σ S_i / Σ s_i``, and its linearised variance with the sample as the unit
(Cochran, Sampling Techniques, §6 and §11: ratio estimator, one-stage clusters of unequal size) is

    E‖Ĉ − C‖² ≈ B/(B−1) · Σ_i ‖S_i − s_i Ĉ‖² / (Σ s_i)².

For samples of one row this is Ledoit and Wolf's estimate, except for the factor B/(B−1) that corrects it for few
samples. No distribution is assumed; OAS (Chen et al. 2010, arXiv 0907.4698), its rival on small samples, assumes
normal, independent rows. Multiplied out, the variance needs only ``Σ‖S_i‖²`` and ``Σ s_i⟨S_i, Ĉ⟩``, not the ``S_i``.

The *effective* number of tokens is the number of independent tokens with the same error (Kish's design effect).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isnan, nan

import torch
from torch import Tensor

from prehab_export.linalg.gram_matrix import gram
from prehab_export.linalg.masking import real

# Random directions that estimate Σ s_i⟨S_i, Ĉ⟩ (see ``ClusterSums``).
_PROBES = 8
# Up to this many features, all directions are used instead.
_MAX_EXACT_FEATURES = 32


@dataclass(frozen=True)
class Sampling:
    """How precisely a sample determines its second moment; both errors are squared and relative to ‖Ĉ‖²_F.

    samples: the number of independent samples behind the moment.
    error: E‖Ĉ − C‖² / ‖Ĉ‖²; NaN if it was not measured (see ``known``).
    token_error: the same error for a moment estimated from one independent token; NaN together with ``error``.
    """

    samples: int
    error: float
    token_error: float

    @property
    def known(self) -> bool:
        """Whether the errors were measured. If not, nothing is concluded from them: there is no warning of a small
        sample, and no more shrinkage than was configured."""
        return not isnan(self.error)

    @property
    def effective_tokens(self) -> float | None:
        """The number of independent tokens that would estimate the moment equally well; inf when nothing varies, None
        when the errors are not known."""
        if not self.known:
            return None
        return self.token_error / self.error if self.error > 0 else float("inf")

    def intensity(self, moment: Tensor) -> float:
        """Return Ledoit and Wolf's ρ* in [0, 1] for this n×n moment: the sampling error over the distance from its own
        μI; 0 when the sampling error is not known."""
        if not self.known:
            return 0.0
        energy, trace = _energy(moment), float(moment.detach().double().trace())
        distance = energy - trace**2 / moment.shape[0]
        # A moment that equals its own μI (to rounding) stays the same for any ρ.
        return min(1.0, self.error * energy / distance) if distance > energy * 1e-14 else 1.0


def shrunk(matrix: Tensor, rho: float) -> Tensor:
    """Return ``(1 − ρ)A + ρ·mean(diag A)·I``, n×n in float64; the trace does not change.

    >>> shrunk(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), 0.5).tolist()
    [[2.5, 0.5], [0.5, 1.5]]
    """
    a = matrix.detach().double()
    a = a + a.T  # twice the symmetric part
    mean = 0.5 * a.diagonal().mean()
    a.mul_(0.5 * (1 - rho)).diagonal().add_(rho * mean)
    return a


class ClusterSums:
    """Running sums over samples: the sum of outer products, and the sums from which ``Sampling`` follows.

    ``Σ s_i⟨S_i, Ĉ⟩`` would need a second n×n sum, at the cost of the first. It equals ``κ Σ⟨S_i, Ĉ⟩`` with κ the mean
    sample size, weighted as the moment weighs the samples. κ is estimated on 8 random directions P:
    ``κ = ⟨ΣsSP, ΣSP⟩ / ‖ΣSP‖²``. The estimate is exact when all sizes are equal, and when one direction outweighs the
    rest.

    The products of one batch are computed in the values' dtype, and summed over batches in float64: the order of the
    batches, or their distribution over processes, then makes no difference in float32.

    Args:
        keep_on: the device of the n×n sum, by default that of the values; everything else stays with the values.
    """

    def __init__(self, keep_on: torch.device | None = None) -> None:
        self.keep_on = keep_on
        self.samples = self.rows = 0
        self.size = self.squared_size = self.squared_norms = self.fourth = 0.0
        self.outer = self._weighted = torch.empty(0, dtype=torch.float64)

    def add(self, values: Tensor, mask: Tensor, sizes: Tensor) -> None:
        """Add B samples.

        Args:
            values: (B, T, n), float32 or float64.
            mask: (B, T) bool, True for real rows.
            sizes: (B), the s_i.
        """
        x = values.masked_fill(~mask[..., None], 0)  # padding may hold anything, even NaN
        samples, tokens, n = x.shape
        flat, per_row = x.reshape(-1, n), sizes.to(x.dtype)[:, None].expand(samples, tokens).reshape(-1, 1)
        probes = _probes(n).to(x)
        if 4 * tokens < n:  # ‖S_i‖ from the T×T Gram matrix; otherwise from S_i itself, which then also gives the sum
            outer = gram(flat)
            self.squared_norms += float((x @ x.mT).double().square().sum())
        else:
            outer = x.new_zeros(n, n)
            for sample in x:
                sample_outer = gram(sample)
                outer += sample_outer
                self.squared_norms += float(sample_outer.flatten().dot(sample_outer.flatten()))
        weighted = (flat * per_row).T @ (flat @ probes)
        self.outer = _added(self.outer, outer, self.keep_on or x.device)
        self._weighted = _added(self._weighted, weighted, x.device)
        self.fourth += float(flat.square().sum(1).double().square().sum())
        self.samples += int((sizes > 0).sum())
        self.rows += int(mask.sum())
        self.size += float(sizes.double().sum())
        self.squared_size += float(sizes.double().square().sum())

    def pool(self, total: Callable[[Tensor], Tensor], features: int, device: torch.device) -> None:
        """Replace every sum by its total over several processes, each of which has added other samples.

        Args:
            total: returns the total of a tensor over all processes.
            features: n, for a process that has added none.
            device: the device of the values, for the same case.
        """
        self.outer = total(_sized(self.outer, (features, features), self.keep_on or device))
        self._weighted = total(_sized(self._weighted, _probes(features).shape, device))
        figures = [self.samples, self.rows, self.size, self.squared_size, self.squared_norms, self.fourth]
        samples, rows, *others = total(torch.tensor(figures, dtype=torch.float64)).tolist()
        self.samples, self.rows = int(samples), int(rows)
        self.size, self.squared_size, self.squared_norms, self.fourth = others

    def sampling(self) -> Sampling:
        """Return the sampling error of ``outer / size``. A single sample says nothing about the next one, so its
        tokens stand in for samples."""
        total = self.outer
        energy = _energy(total)
        if energy == 0:
            return Sampling(self.samples, 0.0, 0.0)
        small_sample = self.rows / (self.rows - 1) if self.rows > 1 else 1.0
        token_error = max(0.0, self.rows * self.fourth / energy - 1) * small_sample
        if self.samples < 2:
            return Sampling(self.samples, token_error / self.rows, token_error)
        probed = total @ _probes(total.shape[0]).to(total)
        weighted_size = float((self._weighted.to(probed) * probed).sum() / (probed * probed).sum())
        error = self.squared_norms / energy - 2 * weighted_size / self.size + self.squared_size / self.size**2
        return Sampling(self.samples, max(0.0, error) * self.samples / (self.samples - 1), token_error)


class PlainSums:
    """`ClusterSums` without the sampling error: one matrix product for all samples, whatever their length."""

    def __init__(self, keep_on: torch.device | None = None) -> None:
        self.keep_on = keep_on
        self.samples = self.rows = 0
        self.outer = torch.empty(0, dtype=torch.float64)

    def add(self, values: Tensor, mask: Tensor, sizes: Tensor) -> None:
        """Add B samples, as `ClusterSums.add` does."""
        rows = real(values, mask)
        self.outer = _added(self.outer, gram(rows), self.keep_on or rows.device)
        self.samples += int((sizes > 0).sum())
        self.rows += len(rows)

    def pool(self, total: Callable[[Tensor], Tensor], features: int, device: torch.device) -> None:
        """Replace every sum by its total over several processes, as `ClusterSums.pool` does."""
        self.outer = total(_sized(self.outer, (features, features), self.keep_on or device))
        samples, rows = total(torch.tensor([self.samples, self.rows], dtype=torch.float64)).tolist()
        self.samples, self.rows = int(samples), int(rows)

    def sampling(self) -> Sampling:
        """Return the number of samples with unknown errors."""
        return Sampling(self.samples, nan, nan)


def _added(so_far: Tensor, values: Tensor, device: torch.device) -> Tensor:
    """Add values to a float64 sum in place; an empty one begins on this device."""
    if so_far.numel() == 0:
        return values.to(device, torch.float64)
    so_far += values.to(so_far.device)
    return so_far


def _sized(so_far: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a sum, or zeros of this shape if nothing was added to it."""
    return so_far if so_far.numel() else so_far.new_zeros(shape, device=device)


def _energy(matrix: Tensor) -> float:
    """‖A‖²_F."""
    return float(matrix.detach().double().square().sum())


def _probes(n: int) -> Tensor:
    """P, n×8 of ±1, the same every time; the n×n identity for small n."""
    if n <= _MAX_EXACT_FEATURES:
        return torch.eye(n)
    return torch.randint(0, 2, (n, _PROBES), generator=torch.Generator().manual_seed(n)) * 2.0 - 1
