"""How far a sampled second moment can be trusted, and its shrinkage towards a multiple of the identity.

Ledoit and Wolf (2004, J. Multivariate Analysis 88, 365–411) mix the sample moment with ``μI``, ``μ = tr(Ĉ)/n``:
``(1 − ρ)Ĉ + ρμI``. The expected Frobenius error is least at ``ρ* = E‖Ĉ − C‖² / E‖Ĉ − μI‖²``; the denominator is read
off the sample, the numerator is the sampling error of Ĉ. Theirs is for independent rows. Tokens of one sample are
not independent; samples are. With ``S_i = Σ_t x_t x_tᵀ`` over the rows of sample i and its size ``s_i``, the moment
is the ratio ``Ĉ = Σ S_i / Σ s_i``, and its linearised variance with the sample as the unit (Cochran, Sampling
Techniques, §6 and §11: ratio estimator, one-stage clusters of unequal size) is

    E‖Ĉ − C‖² ≈ B/(B−1) · Σ_i ‖S_i − s_i Ĉ‖² / (Σ s_i)²,

which for samples of one row is Ledoit and Wolf's, but for the factor B/(B−1) that makes it right for few samples.
No distribution is assumed; OAS (Chen et al. 2010, arXiv 0907.4698), its rival on small samples, is for normal,
independent rows. Multiplied out, the variance needs only ``Σ‖S_i‖²`` and ``Σ s_i⟨S_i, Ĉ⟩``, not the ``S_i``.

The *effective* number of tokens is how many independent tokens would have the same error (Kish's design effect).
"""

from dataclasses import dataclass
from math import isnan, nan

import torch
from torch import Tensor

from prehab_export.linalg.gram import gram
from prehab_export.linalg.masking import real

# Directions behind Σ s_i⟨S_i, Ĉ⟩ (see ``ClusterSums``), and up to how many features all of them are taken.
_PROBES = 8
_ALL = 32


@dataclass(frozen=True)
class Sampling:
    """How well a second moment is known from its sample; both errors are squared and relative to ‖Ĉ‖²_F.

    samples: independent samples behind the moment.
    error: E‖Ĉ − C‖² / ‖Ĉ‖²; NaN where it was not asked for, like the next (see ``known``).
    token_error: the same for a moment estimated from one independent token.
    """

    samples: int
    error: float
    token_error: float

    @property
    def known(self) -> bool:
        """Whether the errors were asked for. Where they were not, nothing is concluded from them: no warning of a small
        sample is given, and no more is shrunk than was configured."""
        return not isnan(self.error)

    @property
    def effective_tokens(self) -> float | None:
        """The number of independent tokens that would estimate the moment as well; inf when nothing varies, None when
        the errors are not known."""
        if not self.known:
            return None
        return self.token_error / self.error if self.error > 0 else float("inf")

    def intensity(self, moment: Tensor) -> float:
        """Ledoit and Wolf's ρ* in [0, 1] for this n×n moment: sampling error over distance from its own μI. 0 when the
        sampling error is not known."""
        if not self.known:
            return 0.0
        energy, trace = _energy(moment), float(moment.detach().double().trace())
        distance = energy - trace**2 / moment.shape[0]
        # A moment that is its own target (to rounding) is left alone either way.
        return min(1.0, self.error * energy / distance) if distance > energy * 1e-14 else 1.0


def shrunk(matrix: Tensor, rho: float) -> Tensor:
    """``(1 − ρ)A + ρ·mean(diag A)·I`` in float64, n×n: the trace stays.

    >>> shrunk(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), 0.5).tolist()
    [[2.5, 0.5], [0.5, 1.5]]
    """
    a = matrix.detach().double()
    a = a + a.T
    mean = 0.5 * a.diagonal().mean()
    a.mul_(0.5 * (1 - rho)).diagonal().add_(rho * mean)
    return a


class ClusterSums:
    """Running sums over samples that yield ``Sampling`` and the sum of outer products itself.

    ``Σ s_i⟨S_i, Ĉ⟩`` would need a second n×n sum, at the cost of the first. It is ``κ Σ⟨S_i, Ĉ⟩`` with κ the mean size
    of a sample as the moment sees it, which is taken on 8 random directions P: ``κ = ⟨ΣsSP, ΣSP⟩ / ‖ΣSP‖²``. That is
    exact when all sizes are the same, and when one direction outweighs the rest.

    ``keep_on`` is where the n×n sum lies, by default with the values; everything else stays with them.
    """

    def __init__(self, keep_on: torch.device | None = None) -> None:
        self.keep_on = keep_on
        self.samples = self.rows = 0
        self.size = self.squared_size = self.squared_norms = self.fourth = 0.0
        self.outer = self._weighted = torch.empty(0)

    def add(self, values: Tensor, mask: Tensor, sizes: Tensor) -> None:
        """Add B samples: values (B, T, n) float32 or float64, mask bool (B, T) of real rows, sizes s_i (B)."""
        x = values.masked_fill(~mask[..., None], 0)  # padding may hold anything, NaN included
        samples, tokens, n = x.shape
        flat, per_row = x.reshape(-1, n), sizes.to(x.dtype)[:, None].expand(samples, tokens).reshape(-1, 1)
        probes = _probes(n).to(x)
        if 4 * tokens < n:  # ‖S_i‖ from the T×T Gram matrix; otherwise from S_i, which then makes up the sum
            outer = gram(flat)
            self.squared_norms += float((x @ x.mT).double().square().sum())
        else:
            outer = x.new_zeros(n, n)
            for sample in x:
                own = gram(sample)
                outer += own
                self.squared_norms += float(own.flatten().dot(own.flatten()))
        weighted = (flat * per_row).T @ (flat @ probes)
        if self.outer.numel() == 0:
            self.outer, self._weighted = outer.to(self.keep_on or x.device), weighted
        else:
            self.outer += outer.to(self.outer.device)
            self._weighted += weighted
        self.fourth += float(flat.square().sum(1).double().square().sum())
        self.samples += int((sizes > 0).sum())
        self.rows += int(mask.sum())
        self.size += float(sizes.double().sum())
        self.squared_size += float(sizes.double().square().sum())

    def sampling(self) -> Sampling:
        """Of ``outer / size``. One sample alone says nothing of the next, so its tokens stand in for samples."""
        total = self.outer.double()
        energy = _energy(total)
        if energy == 0:
            return Sampling(self.samples, 0.0, 0.0)
        small_sample = self.rows / (self.rows - 1) if self.rows > 1 else 1.0
        token_error = max(0.0, self.rows * self.fourth / energy - 1) * small_sample
        if self.samples < 2:
            return Sampling(self.samples, token_error / self.rows, token_error)
        probed = total @ _probes(total.shape[0]).to(total)
        seen_size = float((self._weighted.to(probed) * probed).sum() / (probed * probed).sum())
        error = self.squared_norms / energy - 2 * seen_size / self.size + self.squared_size / self.size**2
        return Sampling(self.samples, max(0.0, error) * self.samples / (self.samples - 1), token_error)


class PlainSums:
    """`ClusterSums` that say nothing of sampling: one product for all samples, whatever their length."""

    def __init__(self, keep_on: torch.device | None = None) -> None:
        self.keep_on = keep_on
        self.samples = self.rows = 0
        self.outer = torch.empty(0)

    def add(self, values: Tensor, mask: Tensor, sizes: Tensor) -> None:
        """As `ClusterSums.add`."""
        rows = real(values, mask)
        outer = gram(rows)
        self.outer = self.outer + outer.to(self.outer.device) if self.outer.numel() else outer.to(self.keep_on)
        self.samples += int((sizes > 0).sum())
        self.rows += len(rows)

    def sampling(self) -> Sampling:
        return Sampling(self.samples, nan, nan)


def _energy(matrix: Tensor) -> float:
    """‖A‖²_F."""
    return float(matrix.detach().double().square().sum())


def _probes(n: int) -> Tensor:
    """P, n×8 of ±1, the same every time; the identity where n is small."""
    if n <= _ALL:
        return torch.eye(n)
    return torch.randint(0, 2, (n, _PROBES), generator=torch.Generator().manual_seed(n)) * 2.0 - 1
