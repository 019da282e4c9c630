"""Two factors on a grid: which pair, of all that make the same product, survives quantisation best.

A grid stores a weight (out×in) as whole numbers times steps, one step a row or a block of a row, set by the largest
entry. ``U D`` may be written ``(U T)(T⁻¹ D)`` with any invertible T, and rounding moves the output by about

    Σ_i M_ii K_ii,   M = Uᵀ G U,   K = D C Dᵀ + tr(C)/n · D Dᵀ

(rounding D puts noise of the size of its rows on rank i, which M_ii weighs; rounding U, and the activations between
the two, puts noise of the size of M's diagonal on ranks of variance (D C Dᵀ)_ii). T makes them TᵀMT and T⁻¹KT⁻ᵀ. The
singular values s of M^½ K^½ stay, and the sum is least, (Σ s)²/r, where both are equal and of constant diagonal:
balanced as in Moore's realisations (IEEE Trans. Autom. Control 26, 1981), then turned by an orthogonal matrix that
spreads every s over all ranks, as QuIP (arXiv 2307.13304) does for whole weights.

Rounding itself is GPTQ's (arXiv 2210.17323): column by column, each column's error fed forward to those still to come
along the Hessian, C for D, D̂ C D̂ᵀ for U. Before U is rounded it is fitted to the rounded D̂,
``U* = U (D C D̂ᵀ)(D̂ C D̂ᵀ)⁻¹``. Entries that set a step keep their whole number, so that a quantiser which rounds to the
nearest finds the same steps again and changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.onnx.modes import BLOCK
from converters.roots import damped, root_of, upper_root_of_inverse
from prehab_export.linalg.decomposition import objective_value

# Share of the mean diagonal that keeps a Hessian invertible; the value that GPTQ's authors use.
FEEDBACK_DAMPING = 1e-2
# Turns of rounding one factor and fitting the other; the first few bring nearly all.
TURNS = 3
# Standard deviations between zero and the largest of some thousand activations.
REACH = 5.0
# Columns whose errors are handed on together.
COLUMNS = 128


@dataclass(frozen=True)
class Grid:
    """bits: of a whole number. block: so many inputs of one output have a step of their own; None: all of them."""

    bits: int
    block: int | None = None

    def steps(self, weight: Tensor) -> Tensor:
        """The step of every entry of ``weight`` (m×n), m×n float32. A block's has a sign: its largest entry is the
        most negative whole number, of which there is one more than of positive ones."""
        values = weight.float()
        if self.block is None:
            # In float64 as the quantiser has it, and then rounded.
            step = (2 * values.abs().amax(1, keepdim=True).double() / (2**self.bits - 2)).float()
            return step.expand_as(values)
        blocks = torch.nn.functional.pad(values, (0, -values.shape[1] % self.block)).unflatten(1, (-1, self.block))
        low, high = blocks.amin(2), blocks.amax(2)
        extreme = torch.where(high.abs() > low.abs(), high, low)
        return (extreme / -self.half).repeat_interleave(self.block, 1)[:, : values.shape[1]]

    @property
    def half(self) -> int:
        return 2 ** (self.bits - 1)

    def rounded(self, values: Tensor, steps: Tensor) -> Tensor:
        """The nearest whole numbers, in the dtype of ``values``; 0 where the step is 0."""
        if self.block is None:
            numbers = (values / steps).round_()
        else:  # halves upwards, as the kernels have it, which multiply by the inverse
            numbers = (values * steps.reciprocal()).add_(self.half).add_(0.5).floor_().sub_(self.half)
        return numbers.clamp_(-self.half, self.half - 1).masked_fill_(steps == 0, 0)

    def snap(self, weight: Tensor) -> Tensor:
        """What a quantiser makes of ``weight`` (m×n), and a runtime of that again: float32."""
        values = weight.float()
        steps = self.steps(values)
        return self.rounded(values, steps) * steps


# Kind of quantisation → its grid; float16's is too fine to be worth fitting to.
GRIDS = {
    "int8": Grid(8),
    "int8-tables4": Grid(8),
    "int8-static": Grid(8),
    "int8-blocks": Grid(8, BLOCK),
    "int4": Grid(4, BLOCK),
}


@dataclass(frozen=True)
class Pair:
    """Factors of layers with one input: ups (each m_i×r) and the ``down`` (r×n) that they share. float64."""

    ups: tuple[Tensor, ...]
    down: Tensor

    def snapped(self, grid: Grid) -> "Pair":
        return Pair(tuple(grid.snap(up).double() for up in self.ups), grid.snap(self.down).double())


@dataclass(frozen=True)
class Weighing:
    """C (n×n) of the common input and G (m_i×m_i) of every output, None for the identity."""

    second_moment: Tensor
    gradients: tuple[Tensor | None, ...]

    def objective(self, wanted: Pair, stored: Pair) -> float:
        """``Σ_i tr(G_i Δ_i C Δ_iᵀ)`` with ``Δ_i`` the difference of the two products."""
        return sum(
            objective_value(up @ wanted.down - own @ stored.down, self.second_moment, gradient)
            for up, own, gradient in zip(wanted.ups, stored.ups, self.gradients, strict=True)
        )

    def cost(self, wanted: Pair, stored: Pair, grid: Grid) -> float:
        """The objective, and by estimate what rounding ``stored.down @ x`` to 8 bits adds to it: a step for every block
        of ranks, ``REACH`` standard deviations of the widest of them a 128th."""
        variance = (stored.down @ self.second_moment * stored.down).sum(1)
        weight = self.left(stored.ups).diagonal()
        size = grid.block or len(variance)
        blocks = zip(variance.split(size), weight.split(size), strict=True)
        noise = sum(float(ranks.max() * weights.sum()) for ranks, weights in blocks)
        return self.objective(wanted, stored) + noise * (REACH / 128) ** 2 / 12

    def left(self, ups: Sequence[Tensor]) -> Tensor:
        """``Σ_i U_iᵀ G_i U_i`` (r×r)."""
        parts = [up.T @ (up if g is None else g @ up) for up, g in zip(ups, self.gradients, strict=True)]
        return torch.stack(parts).sum(0)


def spread(pair: Pair, weighing: Weighing) -> Pair:
    """The same products in the rank basis that rounding hurts least, by the estimate at the top of this module."""
    c, down = weighing.second_moment, pair.down
    noise = c.diagonal().mean()
    root = root_of(damped(down @ c @ down.T + noise * down @ down.T, 1e-12))
    # T = root · V s^-½ Q makes TᵀMT and T⁻¹KT⁻ᵀ both Qᵀ diag(s) Q.
    values, vectors = torch.linalg.eigh(root.T @ damped(weighing.left(pair.ups), 1e-12) @ root)
    s = values.clamp_min(values.max() * 1e-24).sqrt()
    turn = hartley(len(s)).to(down)
    change = root @ (vectors * s.rsqrt()) @ turn
    inverse = turn.T @ ((vectors * s.sqrt()).T @ torch.linalg.inv(root))
    return Pair(tuple(up @ change for up in pair.ups), inverse @ down)


def hartley(size: int) -> Tensor:
    """The orthogonal matrix of cas(2πij/size)/√size, float64: any diagonal matrix turned by it has a diagonal that is
    nearly constant, whatever the size, and the same on every machine."""
    index = torch.arange(size, dtype=torch.float64)
    angle = 2 * torch.pi * torch.outer(index, index).remainder(size) / size
    return (angle.cos() + angle.sin()) / size**0.5


@dataclass(frozen=True)
class Feedback:
    """How columns take over the errors of earlier ones. order: of n columns, those of largest curvature first. shares
    (n×n, upper): of each column's error, in that order."""

    order: Tensor
    shares: Tensor

    @classmethod
    def along(cls, hessian: Tensor) -> "Feedback":
        """For errors Δ that count as tr(Δ hessian Δᵀ)."""
        order = hessian.diagonal().argsort(descending=True, stable=True)
        regular = damped(hessian, FEEDBACK_DAMPING)[order][:, order]
        ahead = upper_root_of_inverse(regular)
        return cls(order, ahead / ahead.diagonal()[:, None])


def fed_back(weight: Tensor, feedback: Feedback, grid: Grid) -> Tensor:
    """``weight`` (m×n) on the grid that its own largest entries set, each column's rounding error made up for by
    columns still to come; float64. Snapping the result changes nothing."""
    order, shares = feedback.order, feedback.shares
    single = grid.steps(weight)
    # Column by column, so columns lie in one piece here: n×m.
    values, steps, pinned, numbers = (
        entries[:, order].T.contiguous()
        for entries in (
            weight.double(),
            single.double(),
            _sets_step(weight.float(), grid),
            grid.rounded(weight.float(), single).double(),
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
    back = torch.empty_like(weight, dtype=torch.float64)
    back[:, order] = stored.T
    return back


def _sets_step(values: Tensor, grid: Grid) -> Tensor:
    """Where the entries are that the steps come from, bool m×n."""
    if grid.block is None:
        return values.abs() == values.abs().amax(1, keepdim=True)
    return values == -grid.half * grid.steps(values)


def refitted_ups(wanted: Pair, down: Tensor, second_moment: Tensor) -> tuple[Tensor, ...]:
    """The best ups for another ``down`` (r×n): least squares in the metric C, whatever G is."""
    cross = wanted.down @ second_moment @ down.T
    own = damped(down @ second_moment @ down.T, 1e-12)
    mixing = torch.linalg.solve(own, cross, left=False)
    return tuple(up @ mixing for up in wanted.ups)


def refitted_down(wanted: Pair, ups: Sequence[Tensor], weighing: Weighing) -> Tensor:
    """The best ``down`` for other ups: least squares in the metrics G, whatever C is."""
    parts = [
        own.T @ (up if g is None else g @ up) for own, up, g in zip(ups, wanted.ups, weighing.gradients, strict=True)
    ]
    return torch.linalg.solve(damped(weighing.left(ups), 1e-12), torch.stack(parts).sum(0)) @ wanted.down


def fit_to_grid(pair: Pair, weighing: Weighing, grid: Grid) -> Pair:
    """Factors on the grid whose products are nearest to those of ``pair``: never costlier than ``pair`` snapped.

    ``pair`` is spread over the ranks; then, in turns, each factor is rounded with feedback and the other fitted to it.
    """
    if not weighing.objective(pair, Pair(pair.ups, torch.zeros_like(pair.down))) > 0:
        return pair.snapped(grid)  # nothing goes through this layer, or nothing comes of it
    start, c = spread(pair, weighing), weighing.second_moment
    candidates = [pair.snapped(grid), start.snapped(grid)]
    inputs, down = Feedback.along(c), start.down
    for _ in range(TURNS):
        down = fed_back(down, inputs, grid)
        ranks = Feedback.along(down @ c @ down.T)
        ups = tuple(fed_back(up, ranks, grid) for up in refitted_ups(start, down, c))
        candidates.append(Pair(ups, down))
        down = refitted_down(start, ups, weighing)
    return min(candidates, key=lambda stored: weighing.cost(pair, stored, grid))
