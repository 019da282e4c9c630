"""Fit two factors to a quantisation grid: find, among all pairs with the same product, the one that loses least.

A grid stores a weight (out×in) as integers times steps. There is one step per row or per block of a row, set by the
largest entry. ``U D`` equals ``(U T)(T⁻¹ D)`` for any invertible T, and rounding moves the output by about

    Σ_i M_ii K_ii,   M = Uᵀ G U,   K = D C Dᵀ + tr(C)/n · D Dᵀ.

Rounding D adds noise to rank i in proportion to the size of D's rows, and M_ii weighs it. Rounding U, and the
activations between the factors, adds noise in proportion to M's diagonal to ranks of variance (D C Dᵀ)_ii. T turns M
into TᵀMT and K into T⁻¹KT⁻ᵀ. The singular values s of M^½ K^½ do not change, and the sum is least, (Σ s)²/r, when M and
K are equal and have a constant diagonal. So the pair is balanced as in Moore's realisations (IEEE Trans. Autom. Control
26, 1981), then turned by an orthogonal matrix that spreads every s over all ranks, as QuIP (arXiv 2307.13304) does for
whole weights.

The rounding is that of GPTQ (arXiv 2210.17323): column by column, each column's error is passed on to later columns
along the Hessian, which is C for D and D̂ C D̂ᵀ for U. Before U is rounded, it is fitted to the rounded D̂:
``U* = U (D C D̂ᵀ)(D̂ C D̂ᵀ)⁻¹``. Entries that set a step keep their integer, so a quantiser that rounds to nearest finds
the same steps again and changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.onnx.modes import BLOCK
from converters.roots import damped, root_of, upper_root_of_inverse
from prehab_export.linalg.decomposition import objective_value

# Damping that keeps a Hessian invertible, as a share of its mean diagonal; the value that GPTQ's authors use.
FEEDBACK_DAMPING = 1e-2
# How often one factor is rounded and the other fitted to it; the first few times bring nearly all of the gain.
ALTERNATIONS = 3
# Standard deviations between zero and the largest of some thousand activations.
REACH = 5.0
# Columns per block; the errors of a block are passed on to later blocks in one matrix product.
COLUMNS = 128


@dataclass(frozen=True)
class Grid:
    """Integers times steps.

    bits: of one integer.
    block: how many inputs of one output share a step; None if all of them do.
    """

    bits: int
    block: int | None = None

    def steps(self, weight: Tensor) -> Tensor:
        """Return the step of every entry of ``weight`` (m×n), m×n float32.

        A block's step has a sign: the block's largest entry becomes the most negative integer, since there is one more
        negative integer than there are positive ones.
        """
        values = weight.float()
        if self.block is None:
            # Computed in float64 and then rounded, as the quantiser does it.
            step = (2 * values.abs().amax(1, keepdim=True).double() / (2**self.bits - 2)).float()
            return step.expand_as(values)
        blocks = torch.nn.functional.pad(values, (0, -values.shape[1] % self.block)).unflatten(1, (-1, self.block))
        low, high = blocks.amin(2), blocks.amax(2)
        extreme = torch.where(high.abs() > low.abs(), high, low)
        return (extreme / -self.half).repeat_interleave(self.block, 1)[:, : values.shape[1]]

    @property
    def half(self) -> int:
        """Half the number of integers; integers lie in [−half, half)."""
        return 2 ** (self.bits - 1)

    def rounded(self, values: Tensor, steps: Tensor) -> Tensor:
        """Return the nearest integers, in the dtype of ``values``; 0 where the step is 0."""
        if self.block is None:
            numbers = (values / steps).round_()
        else:  # halves round up and values are multiplied by the inverse step, as in the kernels
            numbers = (values * steps.reciprocal()).add_(self.half).add_(0.5).floor_().sub_(self.half)
        return numbers.clamp_(-self.half, self.half - 1).masked_fill_(steps == 0, 0)

    def snap(self, weight: Tensor) -> Tensor:
        """Quantise ``weight`` (m×n) as a quantiser does and dequantise it as a runtime does; float32."""
        values = weight.float()
        steps = self.steps(values)
        return self.rounded(values, steps) * steps


# Quantisation mode → its grid. That of float16 is too fine to be worth fitting to.
GRIDS = {
    "int8": Grid(8),
    "int8-tables4": Grid(8),
    "int8-static": Grid(8),
    "int8-blocks": Grid(8, BLOCK),
    "int4": Grid(4, BLOCK),
}


@dataclass(frozen=True)
class Pair:
    """The factors of layers with one input: ups (each m_i×r) and the ``down`` (r×n) that they share. float64."""

    ups: tuple[Tensor, ...]
    down: Tensor

    def snapped(self, grid: Grid) -> "Pair":
        """Return the pair as it is after quantisation, each entry rounded to the nearest."""
        return Pair(tuple(grid.snap(up).double() for up in self.ups), grid.snap(self.down).double())


@dataclass(frozen=True)
class Weighing:
    """The metric in which errors count: C (n×n) of the common input, and G (m_i×m_i) of every output or None for the
    identity."""

    second_moment: Tensor
    gradients: tuple[Tensor | None, ...]

    def objective(self, original: Pair, stored: Pair) -> float:
        """Return ``Σ_i tr(G_i Δ_i C Δ_iᵀ)``, with ``Δ_i`` the difference of the two products."""
        return sum(
            objective_value(up @ original.down - stored_up @ stored.down, self.second_moment, gradient)
            for up, stored_up, gradient in zip(original.ups, stored.ups, self.gradients, strict=True)
        )

    def cost(self, original: Pair, stored: Pair, grid: Grid) -> float:
        """Return the objective plus an estimate of what rounding ``stored.down @ x`` to 8 bits adds to it.

        Each block of ranks has one step: a 128th of ``REACH`` standard deviations of the block's widest rank.
        """
        variance = (stored.down @ self.second_moment * stored.down).sum(1)
        weight = self.ups_gram(stored.ups).diagonal()
        size = grid.block or len(variance)
        blocks = zip(variance.split(size), weight.split(size), strict=True)
        noise = sum(float(variances.max() * weights.sum()) for variances, weights in blocks)
        return self.objective(original, stored) + noise * (REACH / 128) ** 2 / 12

    def ups_gram(self, ups: Sequence[Tensor]) -> Tensor:
        """Return ``Σ_i U_iᵀ G_i U_i`` (r×r)."""
        parts = [up.T @ (up if g is None else g @ up) for up, g in zip(ups, self.gradients, strict=True)]
        return torch.stack(parts).sum(0)


def spread(pair: Pair, weighing: Weighing) -> Pair:
    """Return the same products in the rank basis that suffers least from rounding, by the estimate in the module
    docstring."""
    c, down = weighing.second_moment, pair.down
    noise = c.diagonal().mean()
    root = root_of(damped(down @ c @ down.T + noise * down @ down.T, 1e-12))
    # T = root · V s^-½ Q makes TᵀMT and T⁻¹KT⁻ᵀ both Qᵀ diag(s) Q.
    values, vectors = torch.linalg.eigh(root.T @ damped(weighing.ups_gram(pair.ups), 1e-12) @ root)
    s = values.clamp_min(values.max() * 1e-24).sqrt()
    q = hartley(len(s)).to(down)
    t = root @ (vectors * s.rsqrt()) @ q
    t_inverse = q.T @ ((vectors * s.sqrt()).T @ torch.linalg.inv(root))
    return Pair(tuple(up @ t for up in pair.ups), t_inverse @ down)


def hartley(size: int) -> Tensor:
    """Return the orthogonal matrix with entries cas(2πij/size)/√size, float64.

    It turns any diagonal matrix into one with a nearly constant diagonal, works for any size, and is the same on every
    machine.
    """
    index = torch.arange(size, dtype=torch.float64)
    angle = 2 * torch.pi * torch.outer(index, index).remainder(size) / size
    return (angle.cos() + angle.sin()) / size**0.5


@dataclass(frozen=True)
class Feedback:
    """How later columns compensate for the rounding errors of earlier ones.

    order: the indices of the n columns, largest curvature first.
    shares: n×n, upper triangular, in that order: row i holds the shares of column i's error that later columns take.
    """

    order: Tensor
    shares: Tensor

    @classmethod
    def along(cls, hessian: Tensor) -> "Feedback":
        """Build the feedback for errors Δ that cost tr(Δ hessian Δᵀ)."""
        order = hessian.diagonal().argsort(descending=True, stable=True)
        regular = damped(hessian, FEEDBACK_DAMPING)[order][:, order]
        root = upper_root_of_inverse(regular)
        return cls(order, root / root.diagonal()[:, None])


def fed_back(weight: Tensor, feedback: Feedback, grid: Grid) -> Tensor:
    """Round ``weight`` (m×n) to the grid set by its own largest entries, with each column's error compensated by later
    columns; float64. Snapping the result changes nothing."""
    order, shares = feedback.order, feedback.shares
    float_steps = grid.steps(weight)
    # Transposed to n×m, so that each column is contiguous in memory.
    values, steps, pinned, numbers = (
        entries[:, order].T.contiguous()
        for entries in (
            weight.double(),
            float_steps.double(),
            _sets_step(weight.float(), grid),
            grid.rounded(weight.float(), float_steps).double(),
        )
    )
    stored = numbers * steps
    for start in range(0, len(order), COLUMNS):
        stop = min(start + COLUMNS, len(order))
        errors = torch.empty_like(values[start:stop])
        for j in range(start, stop):
            nearest = grid.rounded(values[j], steps[j]) * steps[j]
            stored[j] = torch.where(pinned[j], stored[j], nearest)
            error = torch.sub(values[j], stored[j], out=errors[j - start])
            values[j + 1 : stop].addr_(shares[j, j + 1 : stop], error, alpha=-1)
        values[stop:].addmm_(shares[start:stop, stop:].T, errors, alpha=-1)
    result = torch.empty_like(weight, dtype=torch.float64)
    result[:, order] = stored.T
    return result


def _sets_step(values: Tensor, grid: Grid) -> Tensor:
    """Mark the entries that set the steps, bool m×n."""
    if grid.block is None:
        return values.abs() == values.abs().amax(1, keepdim=True)
    return values == -grid.half * grid.steps(values)


def refitted_ups(original: Pair, down: Tensor, second_moment: Tensor) -> tuple[Tensor, ...]:
    """Return the best ups for another ``down`` (r×n): least squares in the metric C, whatever G is."""
    cross = original.down @ second_moment @ down.T
    gram = damped(down @ second_moment @ down.T, 1e-12)
    mixing = torch.linalg.solve(gram, cross, left=False)
    return tuple(up @ mixing for up in original.ups)


def refitted_down(original: Pair, ups: Sequence[Tensor], weighing: Weighing) -> Tensor:
    """Return the best ``down`` for other ups: least squares in the metrics G, whatever C is."""
    crosses = [
        up.T @ (original_up if g is None else g @ original_up)
        for up, original_up, g in zip(ups, original.ups, weighing.gradients, strict=True)
    ]
    return torch.linalg.solve(damped(weighing.ups_gram(ups), 1e-12), torch.stack(crosses).sum(0)) @ original.down


def fit_to_grid(pair: Pair, weighing: Weighing, grid: Grid) -> Pair:
    """Find factors on the grid whose products are close to those of ``pair``; never costlier than ``pair`` snapped.

    ``pair`` is first spread over the ranks. Then each factor in turn is rounded with feedback, and the other one is
    fitted to it.
    """
    if not weighing.objective(pair, Pair(pair.ups, torch.zeros_like(pair.down))) > 0:
        return pair.snapped(grid)  # the layer has no input, or its output does not affect the loss
    spread_pair, c = spread(pair, weighing), weighing.second_moment
    candidates = [pair.snapped(grid), spread_pair.snapped(grid)]
    down_feedback, down = Feedback.along(c), spread_pair.down
    for _ in range(ALTERNATIONS):
        down = fed_back(down, down_feedback, grid)
        up_feedback = Feedback.along(down @ c @ down.T)
        ups = tuple(fed_back(up, up_feedback, grid) for up in refitted_ups(spread_pair, down, c))
        candidates.append(Pair(ups, down))
        down = refitted_down(spread_pair, ups, weighing)
    return min(candidates, key=lambda stored: weighing.cost(pair, stored, grid))
