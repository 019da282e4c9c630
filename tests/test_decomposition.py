"""Closed-form truncation against brute force in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.lowrank import balance
from converters.roots import damped, square_root, symmetric, triangular_root
from prehab_export.linalg import krylov
from prehab_export.linalg.decomposition import (
    decompose,
    decompose_jointly,
    eigenvalues,
    joint_eigenvalues,
    objective_value,
    predicted_joint_loss,
    predicted_loss,
)

SHAPES = [(12, 20), (20, 12), (16, 16)]


def moment(size, samples, generator, decay=2.0):
    """A second moment with a spread of scales, of rank min(size, samples)."""
    x = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -decay, size, dtype=torch.float64)
    return x.T @ x / samples


def case(m, n, seed=0, samples=200):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return weight, moment(n, samples, generator), moment(m, samples, generator)


def svd_llm(weight, second_moment, rank):
    """SVD-LLM as published: Cholesky factor S of C, truncated SVD of W S, then a solve with S."""
    factor = torch.linalg.cholesky(second_moment)
    u, s, vt = torch.linalg.svd(weight @ factor, full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return torch.linalg.solve_triangular(factor, cut, upper=False, left=False)


def whitened_optimum(weight, c, g, rank):
    """Least possible objective at this rank: the tail of the whitened weight's singular values (Eckart–Young)."""
    whitened = square_root(g) @ weight @ square_root(c)
    return float(torch.linalg.svdvals(whitened)[rank:].square().sum())


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_activation_is_svd_llm(m, n, rank):
    weight, c, _ = case(m, n)
    up, down = decompose(weight, c).truncated(rank)
    assert torch.allclose(up @ down, svd_llm(weight, c, rank), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_weight_is_truncated_svd(m, n):
    weight, _, _ = case(m, n)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    up, down = decompose(weight).truncated(4)
    assert torch.allclose(up @ down, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-10)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("sides", ["C", "G", "CG", ""])
def test_discarded_spectrum_is_the_objective(m, n, sides):
    weight, c, g = case(m, n)
    c = c if "C" in sides else None
    g = g if "G" in sides else None
    result = decompose(weight, c, g)
    for rank in range(min(m, n) + 1):
        up, down = result.truncated(rank)
        value = objective_value(weight - up @ down, c, g)
        assert value == pytest.approx(result.objective(rank), rel=1e-8, abs=1e-12 * float(result.spectrum.sum()))


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("sides", ["C", "G", "CG", ""])
def test_eigenvalues_are_the_spectrum(m, n, sides):
    weight, c, g = case(m, n)
    c, g = (c if "C" in sides else None), (g if "G" in sides else None)
    torch.testing.assert_close(eigenvalues(weight, c, g), decompose(weight, c, g).spectrum)
    others = torch.randn(5, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = None if g is None else [g, torch.eye(5, dtype=torch.float64)]
    expected = decompose_jointly([weight, others], c, gradients).spectrum
    torch.testing.assert_close(joint_eigenvalues([weight, others], c, gradients), expected)


def test_eigenvalues_of_a_zero_moment_are_zero():
    weight, c, g = case(12, 20)
    assert not eigenvalues(weight, torch.zeros_like(c), g).any()
    assert not eigenvalues(weight, c, torch.zeros_like(g)).any()
    assert len(joint_eigenvalues([weight, weight], torch.zeros_like(c))) == 20
    assert not joint_eigenvalues([weight, weight], c, [torch.zeros_like(g)] * 2).any()
    assert joint_eigenvalues([weight, weight], c, [torch.zeros_like(g), g]).any()


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(2, 14),
    n=st.integers(2, 14),
    seed=st.integers(0, 10_000),
    samples=st.integers(1, 40),
    data=st.data(),
)
def test_fisher_reaches_the_optimum_even_with_singular_moments(m, n, seed, samples, data):
    weight, c, g = case(m, n, seed, samples)
    rank = data.draw(st.integers(1, min(m, n)))
    up, down = decompose(weight, c, g).truncated(rank)
    assert up.isfinite().all()
    assert down.isfinite().all()
    scale = objective_value(weight, c, g)
    assert objective_value(weight - up @ down, c, g) <= whitened_optimum(weight, c, g, rank) + 1e-7 * scale


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_each_objective_wins_in_its_own_metric(m, n):
    weight, c, g = case(m, n)
    rank = 4

    def values(metric):
        deltas = [weight - torch.matmul(*decompose(weight, *sides).truncated(rank)) for sides in ((), (c,), (c, g))]
        return [objective_value(delta, *metric) for delta in deltas]

    for own, metric in enumerate(((), (c,), (c, g))):
        scores = values(metric)
        assert scores[own] == min(scores)
        assert all(score > scores[own] * (1 + 1e-6) for at, score in enumerate(scores) if at != own)


def test_ill_conditioned_second_moment_keeps_its_accuracy():
    weight, _, _ = case(48, 64)
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    c = (basis * torch.logspace(0, -15, 64, dtype=torch.float64)) @ basis.T
    result = decompose(weight, c)
    optimum = whitened_optimum(weight, c, torch.eye(48, dtype=torch.float64), 8)
    assert result.objective(8) == pytest.approx(optimum, rel=1e-6)


def test_rank_deficient_weight():
    weight, c, g = case(10, 14)
    weight = weight[:, :3] @ torch.randn(3, 14, dtype=torch.float64)
    up, down = decompose(weight, c, g).truncated(6)
    assert torch.allclose(up @ down, weight, atol=1e-8)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("objective", ["weight", "activation", "fisher"])
def test_predicted_loss_is_half_the_fisher_objective_at_every_rank(m, n, objective):
    weight, c, g = case(m, n)
    sides = {"weight": (), "activation": (c,), "fisher": (c, g)}[objective]
    result = decompose(weight, *sides)
    losses = predicted_loss(result, c, g)
    assert losses.shape == (min(m, n) + 1,)
    for rank in range(min(m, n) + 1):
        up, down = result.truncated(rank)
        brute = 0.5 * objective_value(weight - up @ down, c, g)
        assert float(losses[rank]) == pytest.approx(brute, rel=1e-6, abs=1e-10)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(2, 12), n=st.integers(2, 12), seed=st.integers(0, 1000), scale=st.floats(1e-4, 1e4))
def test_balanced_factors_share_their_scale(m, n, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    rank = min(m, n)
    up = torch.randn(m, rank, generator=generator, dtype=torch.float64) * scale
    down = torch.randn(rank, n, generator=generator, dtype=torch.float64) / scale
    new_up, new_down = balance(up, down)
    assert torch.allclose(new_up @ new_down, up @ down, atol=1e-9)
    assert torch.allclose(new_up.T @ new_up, new_down @ new_down.T, atol=1e-9)


@pytest.fixture
def narrow_blocks(monkeypatch):
    """Krylov spaces pay at small sizes too."""
    monkeypatch.setattr(krylov, "BLOCK", 2)


def large_case(m, n, outlier=1.0):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    scales = torch.ones(n, dtype=torch.float64)
    scales[[3, 77]] = outlier
    # A mixture of sources of decaying variance, as hidden states are, and a few features far above the others.
    c, g = (moment(size, 4 * size, generator) for size in (n, m))
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    return weight, (mix @ c @ mix.T) * scales * scales[:, None], damped(g, 1e-2)


@pytest.mark.parametrize(("m", "n"), [(160, 224), (224, 160), (192, 192)])
@pytest.mark.parametrize("sides", ["C", "CG"])
@pytest.mark.parametrize("outlier", [1.0, 50.0])
def test_leading_ranks_alone_are_as_good(narrow_blocks, m, n, sides, outlier):
    weight, c, g = large_case(m, n, outlier)
    g = g if "G" in sides else None
    exact, leading = decompose(weight, c, g), decompose(weight, c, g, max_rank=40)
    assert len(leading.spectrum) == 40  # found without the others
    assert leading.up.shape == (m, 40)
    assert leading.down.shape == (40, n)
    for rank in (1, 10, 25, 40):
        up, down = leading.truncated(rank)
        value = objective_value(weight - up @ down, c, g)
        assert value == pytest.approx(exact.objective(rank), rel=1e-6)
        assert leading.objective(rank) == pytest.approx(exact.objective(rank), rel=1e-3)
        assert float(leading.objectives()[rank]) == pytest.approx(leading.objective(rank))


@pytest.mark.parametrize("sides", ["C", "CG"])
def test_leading_joint_ranks_alone_are_as_good(narrow_blocks, sides):
    weight, c, g = large_case(224, 160)
    weights, gradients = [weight[:96], weight[96:]], [g[:96, :96], g[96:, 96:]] if "G" in sides else None
    exact, leading = (decompose_jointly(weights, c, gradients, max_rank) for max_rank in (None, 30))
    assert len(leading.spectrum) == 30
    own = gradients or [torch.eye(len(w), dtype=c.dtype) for w in weights]
    for rank in (5, 30):
        ups, down = leading.truncated(rank)
        assert joint_objective(weights, ups, down, c, own) == pytest.approx(exact.objective(rank), rel=1e-6)


@pytest.mark.parametrize("case_", ["flat", "singular", "vanishing"])
def test_leading_ranks_that_a_krylov_space_does_not_settle_are_exact(narrow_blocks, case_):
    weight, c, _ = large_case(160, 224)
    if case_ == "flat":
        c = torch.eye(224, dtype=torch.float64)
    elif case_ == "singular":
        c = c[:, :50] @ c[:50, :]
        c = c @ c.T
    else:
        weight = weight[:, :9] @ weight[:9]
    exact, leading = decompose(weight, c), decompose(weight, c, max_rank=40)
    assert torch.equal(leading.spectrum, exact.spectrum)
    assert torch.equal(leading.up @ leading.down, exact.up[:, :40] @ exact.down[:40])


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("sides", ["C", "G", "CG", ""])
def test_fewer_ranks_of_a_small_weight_are_the_first_of_all(m, n, sides):
    weight, c, g = case(m, n)
    moments = (c if "C" in sides else None, g if "G" in sides else None)
    every, some = decompose(weight, *moments), decompose(weight, *moments, max_rank=5)
    assert torch.equal(some.spectrum, every.spectrum)
    assert some.objective(3) == every.objective(3)
    assert torch.allclose(some.up @ some.down, every.up[:, :5] @ every.down[:5], rtol=0, atol=1e-10)


def joint_case(heights, n, seed=0, samples=200):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(m, n, generator=generator, dtype=torch.float64) for m in heights]
    return weights, moment(n, samples, generator), [moment(m, samples, generator, 1.0) for m in heights]


def joint_optimum(weights, c, gradients, rank):
    """Eckart–Young on the whitened stack, formed as it is defined."""
    whitened = torch.cat([square_root(g) @ w @ square_root(c) for w, g in zip(weights, gradients, strict=True)])
    return float(torch.linalg.svdvals(whitened)[rank:].square().sum())


def joint_objective(weights, ups, down, c, gradients):
    triples = zip(weights, ups, gradients, strict=True)
    return sum(objective_value(w - up @ down, c, g) for w, up, g in triples)


@settings(max_examples=60, deadline=None)
@given(
    heights=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    n=st.integers(2, 10),
    seed=st.integers(0, 10_000),
    samples=st.integers(1, 40),
)
def test_joint_factors_reach_the_optimum_at_every_rank_even_with_singular_moments(heights, n, seed, samples):
    weights, c, gradients = joint_case(heights, n, seed, samples)
    joint = decompose_jointly(weights, c, gradients)
    losses = predicted_joint_loss(joint, c, gradients)
    k = min(n, sum(heights))
    assert [up.shape for up in joint.ups] == [(m, k) for m in heights]
    assert losses.shape == (k + 1,)
    scale = joint_objective(weights, [w[:, :0] for w in weights], c[:0], c, gradients)
    for rank in range(k + 1):
        ups, down = joint.truncated(rank)
        value = joint_objective(weights, ups, down, c, gradients)
        assert value == pytest.approx(joint_optimum(weights, c, gradients, rank), rel=1e-6, abs=1e-9 * scale)
        assert joint.objective(rank) == pytest.approx(value, rel=1e-6, abs=1e-9 * scale)
        assert float(losses[rank]) == pytest.approx(0.5 * value, rel=1e-6, abs=1e-9 * scale)


@pytest.mark.parametrize("sides", ["C", "G", ""])
def test_joint_factors_without_a_metric_on_a_side(sides):
    weights, c, gradients = joint_case((6, 4), 8)
    joint = decompose_jointly(weights, c if "C" in sides else None, gradients if "G" in sides else None)
    own_c = c if "C" in sides else torch.eye(8, dtype=c.dtype)
    own_g = gradients if "G" in sides else [torch.eye(m, dtype=c.dtype) for m in (6, 4)]
    ups, down = joint.truncated(3)
    optimum = joint_optimum(weights, own_c, own_g, 3)
    assert joint_objective(weights, ups, down, own_c, own_g) == pytest.approx(optimum, rel=1e-9)
    # The prediction is always made in the full metric, whatever metric chose the factors.
    expected = 0.5 * joint_objective(weights, ups, down, c, gradients)
    assert float(predicted_joint_loss(joint, c, gradients)[3]) == pytest.approx(expected, rel=1e-9)


def test_one_weight_jointly_is_the_weight_alone():
    weight, c, g = case(12, 20)
    alone, joint = decompose(weight, c, g), decompose_jointly([weight], c, [g])
    assert torch.allclose(alone.spectrum, joint.spectrum, rtol=1e-9, atol=0)
    product = torch.matmul(*alone.truncated(5))
    assert torch.allclose(joint.ups[0][:, :5] @ joint.down[:5], product, atol=1e-8)


def test_roots_and_damping_leave_moments_as_they_are():
    """A moment that is symmetric already is not copied, so nothing may be written into it."""
    _, c, g = case(12, 20)
    before = c.clone(), g.clone()
    damped(c, 0.5), square_root(g), triangular_root(torch.zeros_like(c) + c), decompose(case(12, 20)[0], c, g)
    assert torch.equal(c, before[0])
    assert torch.equal(g, before[1])
    assert symmetric(c) is c or torch.equal(symmetric(c), 0.5 * (c + c.T))
