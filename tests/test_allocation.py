"""Rank allocation against exhaustive search."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from converters.errors import InputError
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.moments import InputMoment, Statistics
from prehab_export.compression.planning import ranks_by
from prehab_export.compression.truncation import truncate
from prehab_export.config.truncate import TruncateConfig
from prehab_export.inputs.tasks import TASKS
from prehab_export.linalg.allocation import (
    Choice,
    _both_forms,
    _lower_hull,
    break_even,
    by_joint_loss,
    by_loss,
    joint_menu,
    rank_menu,
    spend,
    uniform,
)
from prehab_export.linalg.shrinkage import Sampling


def spectrum_losses(size, seed, decay=0.7):
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.sort(torch.rand(size, generator=generator).double() * decay ** torch.arange(size), descending=True)
    tail = spectrum.values.flip(0).cumsum(0).flip(0)
    return 0.5 * torch.cat([tail, tail.new_zeros(1)])


def cost_of(ranks, shapes):
    return sum(m * n if ranks[name] is None else ranks[name] * (m + n) for name, (m, n) in shapes.items())


@pytest.mark.parametrize("keep", [0.1, 0.2, 0.4, 0.6, 0.8, 0.95])
def test_uniform_keeps_at_most_the_share_of_every_layer(keep):
    shapes = {"a": (384, 384), "b": (1536, 384), "c": (30, 500)}
    for name, rank in uniform(shapes, keep).items():
        m, n = shapes[name]
        assert rank is not None
        assert rank * (m + n) <= keep * m * n + 1e-6
        assert (rank + 1) * (m + n) > keep * m * n


def test_uniform_takes_the_exact_floor():
    assert uniform({"q": (384, 384), "f": (1536, 384)}, 1 - 0.6) == {"q": 76, "f": 122}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), keep=st.floats(0.15, 0.9), multiple=st.sampled_from([1, 2, 4]))
def test_allocation_stays_within_budget_and_the_multiple(seed, keep, multiple):
    shapes = {"a": (24, 24), "b": (48, 24), "c": (24, 40)}
    losses = {name: spectrum_losses(min(shape), seed + at) * 10**at for at, (name, shape) in enumerate(shapes.items())}
    ranks = by_loss(shapes, losses, keep, multiple, floor_share=0.0)
    floors = sum(multiple * (m + n) for m, n in shapes.values())
    budget = keep * sum(m * n for m, n in shapes.values())
    assert cost_of(ranks, shapes) <= max(budget, floors) + 1e-6
    assert all(
        rank is None or (rank % multiple == 0 and rank < break_even(*shapes[name])) for name, rank in ranks.items()
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), budget=st.floats(0.2, 0.95))
def test_greedy_is_within_one_step_of_the_optimum(seed, budget):
    shapes = {"a": (6, 8), "b": (10, 6), "c": (8, 8)}
    menus = {
        name: rank_menu(*shape, spectrum_losses(min(shape), seed + at), 1, 1)
        for at, (name, shape) in enumerate(shapes.items())
    }
    limit = budget * sum(m * n for m, n in shapes.values())
    chosen = spend(menus, limit)
    spent = sum(choice.cost for choice in chosen.values())
    loss = sum(choice.loss for choice in chosen.values())
    floors = sum(min(choice.cost for choice in menu) for menu in menus.values())
    assert spent <= max(limit, floors)
    feasible = [
        sum(choice.loss for choice in pick)
        for pick in itertools.product(*menus.values())
        if sum(choice.cost for choice in pick) <= max(limit, floors)
    ]
    # Linear programming duality: the one hull step that did not fit is all that greedy can miss.
    steps = [a.loss - b.loss for menu in menus.values() for a, b in itertools.pairwise(_lower_hull(menu))]
    assert loss <= min(feasible) + max(steps) + 1e-12


def test_break_even_layers_become_dense_and_free_their_budget():
    shapes = {"needs_all": (16, 16), "needs_none": (16, 16)}
    losses = {
        "needs_all": torch.linspace(100, 0, 17, dtype=torch.float64),
        "needs_none": torch.linspace(1e-6, 0, 17, dtype=torch.float64),
    }
    ranks = by_loss(shapes, losses, 0.7, floor_share=0.0)
    assert ranks["needs_all"] is None
    assert ranks["needs_none"] is not None
    assert ranks["needs_none"] < break_even(16, 16)


def test_floor_is_kept():
    shapes = {"a": (64, 64), "b": (64, 64)}
    flat = torch.zeros(65, dtype=torch.float64)
    steep = torch.linspace(1, 0, 65, dtype=torch.float64)
    ranks = by_loss(shapes, {"a": flat, "b": steep}, 0.4, floor_share=0.5)
    assert ranks["a"] >= 0.5 * 12


def test_non_convex_menu_steps_over_the_hump():
    menu = [Choice(1, 1, 10.0), Choice(2, 2, 9.9), Choice(3, 3, 0.0)]
    other = [Choice(1, 1, 5.0), Choice(2, 3, 1.0)]
    chosen = spend({"hump": menu, "other": other}, 4)
    assert chosen["hump"].rank == 3


SHAPES = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8), "gate": (6, 8), "up": (6, 8)}
GROUPS = [("q", "k", "v"), ("gate", "up")]


def offers(seed, sharing):
    """Losses of every layer and of the groups; ``sharing`` scales what a joint rank leaves."""
    losses = {name: spectrum_losses(min(shape), seed + at) for at, (name, shape) in enumerate(SHAPES.items())}
    return losses, {group: spectrum_losses(8, seed + 50) * sharing * len(group) for group in GROUPS}


def joint_cost(result):
    grouped = {name for group in result.shared for name in group}
    cost = cost_of(result.ranks, {name: shape for name, shape in SHAPES.items() if name not in grouped})
    for group in result.shared:
        assert len({result.ranks[name] for name in group}) == 1
        cost += result.ranks[group[0]] * (8 + sum(SHAPES[name][0] for name in group))
    return cost


def joint_loss(result, losses, joint):
    total = sum(float(joint[group][result.ranks[group[0]]]) for group in result.shared)
    grouped = {name for group in result.shared for name in group}
    return total + sum(
        0.0 if rank is None else float(losses[name][rank]) for name, rank in result.ranks.items() if name not in grouped
    )


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1000),
    keep=st.floats(0.1, 0.95),
    multiple=st.sampled_from([1, 2]),
    sharing=st.floats(0.2, 3.0),
    floor_share=st.sampled_from([0.0, 0.3]),
)
def test_joint_allocation_is_never_worse_than_layer_by_layer(seed, keep, multiple, sharing, floor_share):
    losses, joint = offers(seed, sharing)
    result = by_joint_loss(SHAPES, losses, joint, keep, multiple, floor_share)
    alone = by_joint_loss(SHAPES, losses, {}, keep, multiple, floor_share)
    budget = keep * sum(m * n for m, n in SHAPES.values())
    assert alone.ranks == by_loss(SHAPES, losses, keep, multiple, floor_share)
    assert alone.shared == ()
    assert result.cost == joint_cost(result) <= max(budget, alone.cost) + 1e-9
    assert result.predicted_loss == pytest.approx(joint_loss(result, losses, joint))
    if alone.cost <= budget:
        assert result.predicted_loss <= alone.predicted_loss + 1e-12
    assert list(result.ranks) == list(SHAPES)
    for name, rank in result.ranks.items():
        m, n = SHAPES[name]
        assert rank is None or (rank % multiple == 0 and rank >= floor_share * keep * m * n / (m + n) - 1)
        assert rank is not None or not any(name in group for group in result.shared)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), keep=st.floats(0.5, 0.95), sharing=st.floats(0.2, 2.0))
def test_joint_allocation_is_within_one_step_of_the_optimum(seed, keep, sharing):
    shapes = {"a": (4, 5), "b": (3, 5), "c": (5, 4)}
    losses = {name: spectrum_losses(min(shape), seed + at) for at, (name, shape) in enumerate(shapes.items())}
    joint = {("a", "b"): spectrum_losses(5, seed + 9) * 2 * sharing}
    result = by_joint_loss(shapes, losses, joint, keep, floor_share=0.0)
    apart = {name: rank_menu(*shape, losses[name], 1, 1) for name, shape in shapes.items()}
    together = {group: joint_menu([shapes[name] for name in group], loss, 1, 1) for group, loss in joint.items()}
    forms = [list(apart.values()), [apart["c"], together["a", "b"]]]
    budget = keep * sum(m * n for m, n in shapes.values())
    feasible = [
        sum(choice.loss for choice in pick)
        for menus in forms
        for pick in itertools.product(*menus)
        if sum(choice.cost for choice in pick) <= budget
    ]
    hulls = map(_lower_hull, _both_forms(apart, together).values())
    steps = [a.loss - b.loss for hull in hulls for a, b in itertools.pairwise(hull)]
    assert result.cost <= budget
    assert min(feasible) - 1e-12 <= result.predicted_loss <= min(feasible) + max(steps) + 1e-12


def test_each_group_takes_the_form_that_suits_it():
    """Equal row spaces are shared for nothing; unrelated ones cost the joint form the sum of the ranks."""
    shapes = {"a1": (8, 8), "a2": (8, 8), "b1": (8, 8), "b2": (8, 8)}
    losses = dict.fromkeys(shapes, torch.tensor([2.0, 1.0] + [0.0] * 7, dtype=torch.float64))
    joint = {
        ("a1", "a2"): torch.tensor([4.0, 2.0] + [0.0] * 7, dtype=torch.float64),
        ("b1", "b2"): torch.tensor([4.0, 3.0, 2.0, 1.0] + [0.0] * 5, dtype=torch.float64),
    }
    # Room for all of the loss: 2(8 + 16) for the first group and 2 · 2(8 + 8) for the second.
    result = by_joint_loss(shapes, losses, joint, (48 + 64) / 256, floor_share=0.0)
    assert result.shared == (("a1", "a2"),)
    assert result.ranks == dict.fromkeys(shapes, 2)
    assert result.predicted_loss == 0


@pytest.mark.parametrize("allocation", ["uniform", "loss"])
@pytest.mark.parametrize(("ratio", "multiple"), [(0.5, 16), (0.75, 8), (0.85, 4), (0.95, 1)])
def test_the_ratio_goes_before_the_multiple(allocation, ratio, multiple):
    """Two layers of 64×64: rank 16, a half of each's parameters, is the least of whole multiples."""
    losses = {name: spectrum_losses(64, seed) for seed, name in enumerate("ab")}
    config = TruncateConfig(ratio=ratio, allocation=allocation, rank_multiple=16)
    ranks = ranks_by(dict.fromkeys("ab", (64, 64)), (losses, {}), config).ranks
    assert all(rank is not None and rank % multiple == 0 for rank in ranks.values())
    assert sum(128 * rank for rank in ranks.values()) <= (1 - ratio) * 2 * 64 * 64 + 1


def test_layers_that_two_factors_cannot_make_smaller_are_refused():
    """Of one output, that is: at rank 1 its factors have one weight more than the layer."""
    moment = InputMoment(torch.eye(8), torch.zeros(8), 100, Sampling(10, 0.1, 1.0))
    model = nn.ModuleDict({"score": nn.Linear(8, 1)})
    config = TruncateConfig(ratio=0.5, objective="activation", allocation="uniform")
    calibrated = Calibrated(model, TASKS["text-classification"], Statistics({"score": moment}, {"score": "score"}))
    with pytest.raises(InputError, match=r"no layer gets smaller at --ratio 0\.5"):
        truncate(calibrated, config)
