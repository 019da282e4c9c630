"""How the budget of parameters is shared out between layers.

Each layer offers a menu: ranks with their cost and predicted loss. The budget is spent on the steepest drop in
predicted loss per unit of cost, walking each layer's lower convex hull; for convex menus (the usual case) that is
the optimum for the budget it spends. Cost is in parameters, or whatever else adds up over layers (``rank_times``).

Layers with one input may be spent on together: in parameters, a joint rank r costs r(n + Σ mᵢ) instead of
Σ rᵢ(n + mᵢ). A group's menu is then the union of its joint entries and of what its members would be given one after
the other. The lower hull of that union holds, at every price of a unit of cost, the form with the lower Lagrangian
(loss + price · cost), so one walk settles both forms and ranks.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from math import ceil
from typing import TypeVar

from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """One entry of a menu. For a layer ``rank`` None leaves it dense; for a group of layers ``rank`` is the joint
    rank, or None where the members go their own ways, which ``parts`` then are."""

    rank: int | None
    cost: float
    loss: float
    parts: tuple["Choice", ...] = ()


Group = tuple[str, ...]
# (m, n, rank, or None for dense) → what an m×n layer costs; a group of layers with one input counts as their stack.
Cost = Callable[[int, int, int | None], float]
Name = TypeVar("Name", str, Group)
Menus = Mapping[Name, Sequence[Choice]]


@dataclass(frozen=True)
class JointAllocation:
    """Ranks by layer, None for dense; ``shared`` are the groups whose members have one ``down``, of their rank."""

    ranks: dict[str, int | None]
    shared: tuple[Group, ...]
    cost: float
    predicted_loss: float


def parameters(m: int, n: int, rank: int | None) -> float:
    """The numbers that an m×n layer holds, dense or as two factors.

    >>> parameters(4, 6, None), parameters(4, 6, 2)
    (24, 20)
    """
    return m * n if rank is None else rank * (m + n)


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
    return by_joint_loss(shapes, losses, {}, keep, multiple, floor_share).ranks


def by_joint_loss(
    shapes: Mapping[str, tuple[int, int]],
    losses: Mapping[str, Tensor],
    joint: Mapping[Group, Tensor],
    keep: float,
    multiple: int = 1,
    floor_share: float = 0.1,
    cost: Cost = parameters,
) -> JointAllocation:
    """`by_loss` where groups of layers may have one ``down`` if that predicts less loss for the same budget. The
    predicted loss is never above that of `by_loss` where that keeps to the budget.

    Args:
        joint: by group, layers with one input that stand in no other group, the predicted loss increase summed over
            its members at joint ranks 0…min(n, Σ m), as from ``predicted_joint_loss``.
        keep: share of what the dense layers cost.
        cost: what is to be kept to that share.
    """
    lowest = {n: floor_share * (uniform_rank(*shape, keep) or break_even(*shape)) for n, shape in shapes.items()}
    apart = {name: rank_menu(*shape, losses[name], multiple, lowest[name], cost) for name, shape in shapes.items()}
    together = {
        group: joint_menu([shapes[name] for name in group], loss, multiple, max(lowest[name] for name in group), cost)
        for group, loss in joint.items()
    }
    budget = keep * sum(cost(m, n, None) for m, n in shapes.values())
    walked = spend(_both_forms(apart, together), budget)
    shared = {group for group in together if not walked[group].parts}
    # A long step from one form to the other may not fit where short ones do: walk again with the forms settled, and
    # keep to layers on their own if that ends lower still.
    picks = (walked, spend(_one_form(apart, together, shared), budget), spend(_one_form(apart, {}, set()), budget))
    return min((_allocation(pick, shapes) for pick in picks), key=lambda end: (end.cost > budget, end.predicted_loss))


def rank_menu(m: int, n: int, loss: Tensor, multiple: int, lowest: float, cost: Cost = parameters) -> list[Choice]:
    """Ranks from the lowest allowed to break-even in steps of ``multiple``, then dense, by rising cost."""
    values = loss.tolist()
    first = multiple * max(1, ceil(lowest / multiple))
    choices = [Choice(rank, cost(m, n, rank), values[rank]) for rank in range(first, break_even(m, n), multiple)]
    return [*choices, Choice(None, cost(m, n, None), 0.0)]


def joint_menu(
    shapes: Sequence[tuple[int, int]], loss: Tensor, multiple: int, lowest: float, cost: Cost = parameters
) -> list[Choice]:
    """Joint ranks of layers mᵢ×n from the lowest allowed to break-even with the dense layers, by rising cost."""
    stacked, n = sum(m for m, _ in shapes), shapes[0][1]
    return rank_menu(stacked, n, loss, multiple, lowest, cost)[:-1]  # dense is the members' own affair


def _both_forms(apart: Menus[str], together: Menus[Group]) -> dict[Group, Sequence[Choice]]:
    """A menu of both forms for every group, and one for every layer that is in none."""
    unions = {group: [*_one_by_one([apart[name] for name in group]), *menu] for group, menu in together.items()}
    return _one_form(apart, unions, set(unions))


def _one_form(apart: Menus[str], together: Menus[Group], shared: set[Group]) -> dict[Group, Sequence[Choice]]:
    """The joint menus of the shared groups, and a menu for every layer that is in none of them."""
    grouped = set(chain.from_iterable(shared))
    menus: dict[Group, Sequence[Choice]] = {(name,): menu for name, menu in apart.items() if name not in grouped}
    return menus | {group: together[group] for group in together if group in shared}


def _one_by_one(menus: Sequence[Sequence[Choice]]) -> list[Choice]:
    """The lower hull of all combinations of the members' choices: every step of the members' hulls, steepest first."""
    hulls = [_lower_hull(menu) for menu in menus]
    steps = [(-_slope(a, b), at, b) for at, hull in enumerate(hulls) for a, b in pairwise(hull)]
    parts = [hull[0] for hull in hulls]
    entries = [_combined(parts)]
    for _, at, choice in sorted(steps, key=lambda step: step[:2]):
        parts[at] = choice
        entries.append(_combined(parts))
    return entries


def _combined(parts: Sequence[Choice]) -> Choice:
    return Choice(None, sum(part.cost for part in parts), sum(part.loss for part in parts), tuple(parts))


def _allocation(chosen: Mapping[Group, Choice], shapes: Mapping[str, tuple[int, int]]) -> JointAllocation:
    ranks: dict[str, int | None] = {}
    for group, choice in chosen.items():
        parts = choice.parts or (choice,) * len(group)
        ranks |= {name: part.rank for name, part in zip(group, parts, strict=True)}
    return JointAllocation(
        ranks={name: ranks[name] for name in shapes},
        shared=tuple(group for group, choice in chosen.items() if len(group) > 1 and not choice.parts),
        cost=sum(choice.cost for choice in chosen.values()),
        predicted_loss=sum(choice.loss for choice in chosen.values()),
    )


def spend(menus: Menus[Name], budget: float) -> dict[Name, Choice]:
    """Pick one choice from every menu: steepest descent along the convex hulls until nothing more fits.

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
