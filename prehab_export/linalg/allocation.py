"""Share out a budget of parameters between layers.

Each layer has a menu: ranks with their cost and predicted loss. The budget is spent on the steepest drop in predicted
loss per unit of cost, walking along each layer's lower convex hull. For convex menus (the usual case) this is the
optimum for the budget spent. Cost is in parameters, or in anything else that adds up over layers (``rank_times``).

Layers with one input may share a joint rank: in parameters, a joint rank r costs r(n + Σ mᵢ) instead of Σ rᵢ(n + mᵢ). A
group's menu is then the union of its joint entries and of the combinations of its members' own entries. At every price
per unit of cost, the lower hull of that union holds the form with the lower Lagrangian (loss + price · cost), so one
walk decides both forms and ranks.
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
    """One entry of a menu.

    rank: of a layer, or None to leave it dense. Of a group of layers, the joint rank, or None if its members do not
        share a ``down``.
    cost: what this choice costs.
    loss: its predicted loss increase.
    parts: the members' own choices, for a group without a joint rank.
    """

    rank: int | None
    cost: float
    loss: float
    parts: tuple["Choice", ...] = ()


Group = tuple[str, ...]
# (m, n, rank or None for dense) → the cost of an m×n layer; a group of layers with one input counts as their stack.
Cost = Callable[[int, int, int | None], float]
Name = TypeVar("Name", str, Group)
Menus = Mapping[Name, Sequence[Choice]]


@dataclass(frozen=True)
class JointAllocation:
    """Ranks by layer, None for dense.

    shared: the groups whose members share one ``down`` of their common rank.
    cost: the sum over all layers.
    predicted_loss: the sum over all layers.
    """

    ranks: dict[str, int | None]
    shared: tuple[Group, ...]
    cost: float
    predicted_loss: float


def parameters(m: int, n: int, rank: int | None) -> float:
    """Count the parameters of an m×n layer, dense (rank None) or as two factors.

    >>> parameters(4, 6, None), parameters(4, 6, 2)
    (24, 20)
    """
    return m * n if rank is None else rank * (m + n)


def break_even(m: int, n: int) -> int:
    """Return the smallest rank at which two factors hold at least as many parameters as the dense m×n weight.

    >>> break_even(384, 384)
    192
    """
    return ceil(m * n / (m + n))


def uniform_rank(m: int, n: int, keep: float, multiple: int = 1) -> int | None:
    """Return ``floor(keep·m·n/(m+n))``, rounded down to the multiple (but never to 0); None (dense) from break-even on.

    >>> uniform_rank(384, 1536, 0.4)
    122
    >>> uniform_rank(2, 2, 0.9) is None
    True
    """
    # The small constant corrects floor() when keep = 1 − ratio is slightly below the exact decimal.
    rank = max(int(keep * m * n / (m + n) + 1e-9) // multiple, 1) * multiple
    return None if rank >= break_even(m, n) else rank


def uniform(shapes: Mapping[str, tuple[int, int]], keep: float, multiple: int = 1) -> dict[str, int | None]:
    """Give every layer the same share of parameters. Shapes are (m, n); returns ranks by layer, None for dense."""
    return {name: uniform_rank(m, n, keep, multiple) for name, (m, n) in shapes.items()}


def by_loss(
    shapes: Mapping[str, tuple[int, int]],
    losses: Mapping[str, Tensor],
    keep: float,
    multiple: int = 1,
    floor_share: float = 0.1,
) -> dict[str, int | None]:
    """Choose ranks that minimise the summed predicted loss at a share ``keep`` of the selected layers' parameters.

    Args:
        shapes: (m, n) of each layer.
        losses: predicted loss increase of each layer at ranks 0…min(m, n), as returned by ``predicted_loss``.
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
    """Choose ranks as `by_loss` does, and let groups of layers share one ``down`` if that predicts less loss for the
    same budget. The predicted loss is never above that of `by_loss`, if the ranks of `by_loss` meet the budget.

    Args:
        joint: for each group, the predicted loss increase summed over its members at joint ranks 0…min(n, Σ m), as
            returned by ``predicted_joint_loss``. A group consists of layers with one input; groups do not overlap.
        keep: the budget, as a share of the cost of the dense layers.
        cost: the cost function behind the budget.
    """
    lowest = {n: floor_share * (uniform_rank(*shape, keep) or break_even(*shape)) for n, shape in shapes.items()}
    menus = {name: rank_menu(*shape, losses[name], multiple, lowest[name], cost) for name, shape in shapes.items()}
    joint_menus = {
        group: joint_menu([shapes[name] for name in group], loss, multiple, max(lowest[name] for name in group), cost)
        for group, loss in joint.items()
    }
    budget = keep * sum(cost(m, n, None) for m, n in shapes.values())
    choices = spend(_both_forms(menus, joint_menus), budget)
    shared = {group for group in joint_menus if not choices[group].parts}
    # A long step from one form to the other may not fit the budget where short steps do. So walk again with the forms
    # fixed, and once without any sharing, and take the best of the three.
    picks = (choices, spend(_one_form(menus, joint_menus, shared), budget), spend(_one_form(menus, {}, set()), budget))
    return min((_allocation(pick, shapes) for pick in picks), key=lambda end: (end.cost > budget, end.predicted_loss))


def rank_menu(m: int, n: int, loss: Tensor, multiple: int, lowest: float, cost: Cost = parameters) -> list[Choice]:
    """List the ranks from the lowest allowed to break-even in steps of ``multiple``, then dense, by rising cost."""
    values = loss.tolist()
    first = multiple * max(1, ceil(lowest / multiple))
    choices = [Choice(rank, cost(m, n, rank), values[rank]) for rank in range(first, break_even(m, n), multiple)]
    return [*choices, Choice(None, cost(m, n, None), 0.0)]


def joint_menu(
    shapes: Sequence[tuple[int, int]], loss: Tensor, multiple: int, lowest: float, cost: Cost = parameters
) -> list[Choice]:
    """List the joint ranks of layers mᵢ×n from the lowest allowed to break-even with the dense layers, by rising
    cost."""
    total_outputs, n = sum(m for m, _ in shapes), shapes[0][1]
    return rank_menu(total_outputs, n, loss, multiple, lowest, cost)[:-1]  # dense is in the members' own menus


def _both_forms(menus: Menus[str], joint_menus: Menus[Group]) -> dict[Group, Sequence[Choice]]:
    """One menu with both forms for every group, and one for every layer outside the groups."""
    unions = {group: [*_combinations([menus[name] for name in group]), *menu] for group, menu in joint_menus.items()}
    return _one_form(menus, unions, set(unions))


def _one_form(menus: Menus[str], joint_menus: Menus[Group], shared: set[Group]) -> dict[Group, Sequence[Choice]]:
    """The joint menus of the shared groups, and one menu for every layer outside them."""
    grouped = set(chain.from_iterable(shared))
    singles: dict[Group, Sequence[Choice]] = {(name,): menu for name, menu in menus.items() if name not in grouped}
    return singles | {group: joint_menus[group] for group in joint_menus if group in shared}


def _combinations(menus: Sequence[Sequence[Choice]]) -> list[Choice]:
    """The lower hull of all combinations of the members' choices: all steps of the members' hulls, steepest first."""
    hulls = [_lower_hull(menu) for menu in menus]
    steps = [(-_slope(a, b), member, b) for member, hull in enumerate(hulls) for a, b in pairwise(hull)]
    parts = [hull[0] for hull in hulls]
    entries = [_combined(parts)]
    for _, member, choice in sorted(steps, key=lambda step: step[:2]):
        parts[member] = choice
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
    """Pick one choice from every menu, by steepest descent along the convex hulls until nothing more fits the budget.

    Every layer gets at least its cheapest choice, even if the cheapest choices together exceed the budget.
    """
    hulls = {name: _lower_hull(menu) for name, menu in menus.items()}
    position = dict.fromkeys(hulls, 0)
    remaining = budget - sum(hull[0].cost for hull in hulls.values())
    queue = [(-_slope(hull[0], hull[1]), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        hull, index = hulls[name], position[name]
        price = hull[index + 1].cost - hull[index].cost
        if price > remaining:
            continue  # this layer is settled; cheaper steps of other layers may still fit
        remaining -= price
        position[name] = index + 1
        if index + 2 < len(hull):
            heapq.heappush(queue, (-_slope(hull[index + 1], hull[index + 2]), name))
    return {name: hulls[name][index] for name, index in position.items()}


def _lower_hull(menu: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of (cost, loss), in order of rising cost and falling loss."""
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
