"""How the budget of parameters is shared out between layers.

Each layer offers a menu: ranks with their cost and predicted loss. The budget is spent on the steepest drop in
predicted loss per unit of cost, walking each layer's lower convex hull; for convex menus (the usual case) that is
the optimum for the budget it spends. Cost is in parameters here; any other additive cost fits the same walk.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """One entry of a layer's menu. ``rank`` None leaves the layer dense."""

    rank: int | None
    cost: float
    loss: float


def break_even(m: int, n: int) -> int:
    """The smallest rank at which two factors hold at least as many parameters as the dense m×n weight.

    >>> break_even(384, 384)
    192
    """
    return ceil(m * n / (m + n))


def uniform_rank(m: int, n: int, keep: float, multiple: int = 1) -> int | None:
    """``floor(keep·m·n/(m+n))``, rounded down to the multiple (but never to 0); None (dense) from break-even on.

    >>> uniform_rank(384, 1536, 0.4)
    122
    >>> uniform_rank(2, 2, 0.9) is None
    True
    """
    # The small constant keeps floor() honest where keep = 1 − ratio is a hair below the exact decimal.
    rank = max(int(keep * m * n / (m + n) + 1e-9) // multiple, 1) * multiple
    return None if rank >= break_even(m, n) else rank


def uniform(shapes: Mapping[str, tuple[int, int]], keep: float, multiple: int = 1) -> dict[str, int | None]:
    """The same share of parameters for every layer. Shapes are (m, n); returns ranks, None for dense."""
    return {name: uniform_rank(m, n, keep, multiple) for name, (m, n) in shapes.items()}


def by_loss(
    shapes: Mapping[str, tuple[int, int]],
    losses: Mapping[str, Tensor],
    keep: float,
    multiple: int = 1,
    floor_share: float = 0.1,
) -> dict[str, int | None]:
    """Ranks that minimise the summed predicted loss for ``keep`` of the targeted parameters.

    Args:
        shapes: (m, n) of each layer.
        losses: predicted loss increase of each layer at ranks 0…min(m, n), as from ``predicted_loss``.
        multiple: ranks come in multiples of this.
        floor_share: no layer gets less than this share of its uniform rank.
    """
    menus = {
        name: rank_menu(m, n, losses[name], multiple, floor_share * (uniform_rank(m, n, keep) or break_even(m, n)))
        for name, (m, n) in shapes.items()
    }
    budget = keep * sum(m * n for m, n in shapes.values())
    return {name: choice.rank for name, choice in spend(menus, budget).items()}


def rank_menu(m: int, n: int, loss: Tensor, multiple: int, lowest: float) -> list[Choice]:
    """Ranks from the lowest allowed to break-even in steps of ``multiple``, then dense, by rising cost."""
    values = loss.tolist()
    first = multiple * max(1, ceil(lowest / multiple))
    choices = [Choice(rank, rank * (m + n), values[rank]) for rank in range(first, break_even(m, n), multiple)]
    return [*choices, Choice(None, m * n, 0.0)]


def spend(menus: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, Choice]:
    """Pick one choice a layer: steepest descent along the convex hulls until nothing more fits.

    Every layer gets at least its cheapest choice, also when those alone exceed the budget.
    """
    hulls = {name: _lower_hull(menu) for name, menu in menus.items()}
    position = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].cost for hull in hulls.values())
    queue = [(-_slope(hull[0], hull[1]), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        hull, at = hulls[name], position[name]
        price = hull[at + 1].cost - hull[at].cost
        if price > left:
            continue  # too dear for what is left: this layer is settled, cheaper steps of others may still fit
        left -= price
        position[name] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(queue, (-_slope(hull[at + 1], hull[at + 2]), name))
    return {name: hulls[name][at] for name, at in position.items()}


def _lower_hull(menu: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of (cost, loss), by rising cost and falling loss."""
    hull: list[Choice] = []
    for choice in sorted(menu, key=lambda c: (c.cost, c.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    """Loss saved per unit of cost when going from a to b."""
    return (a.loss - b.loss) / (b.cost - a.cost)
