"""Surrogates against singular values, autograd and brute force in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.roots import square_root
from prehab_export.linalg import surrogates
from prehab_export.linalg.surrogates import Frame, Nuclear, Spectral, StochasticStableRank, Tail, Whitened

SHAPES = [(8, 12), (12, 8), (10, 10)]
FUNCTIONS = {"nuclear": surrogates.nuclear, "stable-rank": surrogates.stable_rank, "spectral": surrogates.spectral}
RANK = 3


def matrix(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n, seed):
    """A second moment whose eigenvalues span three decades."""
    x = matrix(3 * n, n, seed) * torch.logspace(0, -1.5, n, dtype=torch.float64)
    return x.T @ x / (3 * n)


def layer(m, n, seed=0, whitened=(True, True)):
    c = moment(n, seed + 1) if whitened[0] else None
    g = moment(m, seed + 2) if whitened[1] else None
    return matrix(m, n, seed), c, g


def whitened_weight(w, c, g):
    """G^½ W C^½ in float64: differentiable in W."""
    left = w if g is None else square_root(g) @ w
    return left if c is None else left @ square_root(c)


def by_singular_values(name, m):
    sigma = torch.linalg.svdvals(m)
    return {
        "tail": sigma[RANK:].square().sum(),
        "nuclear": sigma.sum(),
        "stable-rank": sigma.sum() ** 2 / sigma.square().sum(),
        "spectral": sigma.square().sum() / sigma[0] ** 2,
    }[name]


def framed(w, c, g):
    return Frame.of(w, c, None if g is None else [g])


def whitened(w, c, g):
    return Whitened(framed(w, c, g), w.float())


def make(name, w, c, g):
    return make_of(name, whitened(w, c, g))


def make_of(name, own):
    if name == "tail":
        return Tail(own, RANK)
    return Nuclear(own) if name == "nuclear" else Spectral(own, FUNCTIONS[name])


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_spectrum_is_that_of_the_whitened_weight(m, n):
    w, c, g = layer(m, n)
    own, sigma = whitened(w, c, g), torch.linalg.svdvals(whitened_weight(w, c, g))
    assert torch.allclose(own.spectrum, sigma.square(), rtol=1e-4, atol=1e-6 * float(sigma[0]) ** 2)
    rows, moved = own.frame.rows(w.float())
    energies = ((own.directions.T @ rows) * (own.directions.T @ moved)).sum(1)
    assert torch.allclose(energies.double(), own.spectrum, rtol=1e-3, atol=1e-6 * float(sigma[0]) ** 2)


def cosine(a, b):
    return float((a * b).sum() / a.norm() / b.norm())


@pytest.mark.parametrize("name", ["tail", *FUNCTIONS])
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("whitened", [(True, True), (True, False), (False, True), (False, False)])
def test_value_and_gradient(name, m, n, whitened):
    w, c, g = layer(m, n, whitened=whitened)
    w.requires_grad_()
    expected = by_singular_values(name, whitened_weight(w, c, g))
    (expected_gradient,) = torch.autograd.grad(expected, w)
    value, gradient = make(name, w.detach(), c, g).evaluate(w.detach().float())
    assert float(value) == pytest.approx(expected.item(), rel=1e-4)
    assert (gradient - expected_gradient).norm() <= 1e-3 * expected_gradient.norm()


@settings(max_examples=40, deadline=None)
@given(m=st.integers(2, 12), n=st.integers(2, 12), seed=st.integers(0, 1000), scale=st.floats(1e-4, 1e4))
def test_gradients_at_any_scale_and_shape(m, n, seed, scale):
    """d/dt R((1 + t) W) is degree · R: Euler's identity for homogeneous functions."""
    w, c, g = layer(m, n, seed)
    w = w * scale
    for name, degree in (("nuclear", 1), ("stable-rank", 0), ("spectral", 0)):
        value, gradient = make(name, w, c, g).evaluate(w.float())
        assert float((gradient * w).sum()) == pytest.approx(degree * float(value), abs=2e-3 * float(value))


@settings(max_examples=40, deadline=None)
@given(m=st.integers(2, 12), n=st.integers(2, 12), seed=st.integers(0, 1000), moved=st.floats(0.01, 1.0))
def test_a_stale_basis_never_flatters(m, n, seed, moved):
    w, c, g = layer(m, n, seed)
    later = w + moved * matrix(m, n, seed + 5)
    for name in FUNCTIONS:
        truth = float(by_singular_values(name, whitened_weight(later, c, g)))
        assert float(make(name, w, c, g).evaluate(later.float())[0]) >= truth * (1 - 1e-4)
    rank = min(RANK, min(m, n) - 1)
    tail = float(torch.linalg.svdvals(whitened_weight(later, c, g))[rank:].square().sum())
    size = float(whitened_weight(later, c, g).square().sum())
    assert float(Tail(whitened(w, c, g), rank).evaluate(later.float())[0]) >= tail - 1e-5 * size


@pytest.mark.parametrize("sizes", [(8, 8, 8), (4, 10), (3, 2)])
@pytest.mark.parametrize("name", ["tail", *FUNCTIONS])
def test_stacked_weights_have_a_block_diagonal_gradient_moment(sizes, name):
    """Also where the stack has fewer rows than columns: the near side is always that of the shared input."""
    w, c, _ = layer(sum(sizes), 8)
    blocks = [moment(size, seed) for seed, size in enumerate(sizes)]
    w.requires_grad_()
    expected = by_singular_values(name, whitened_weight(w, c, torch.block_diag(*blocks)))
    (expected_gradient,) = torch.autograd.grad(expected, w)
    frame, own = Frame.of(w, c, blocks), w.detach().float()
    value, gradient = make_of(name, Whitened(frame, own)).evaluate(own)
    energy = float(whitened_weight(w, c, torch.block_diag(*blocks)).square().sum().detach())
    assert not frame.wide
    assert float(value) == pytest.approx(expected.item(), rel=1e-3, abs=1e-6 * energy)  # float32's noise
    assert (gradient - expected_gradient).norm() <= 1e-2 * expected_gradient.norm()


@pytest.mark.parametrize(("m", "n"), [(48, 80), (80, 48)])
def test_tail_follows_a_moving_weight(m, n):
    """A held projector's gradient goes wrong as the weight moves; the iterated one's stays right."""
    rank, w = 12, matrix(m, n)
    c, g = (torch.diag(torch.logspace(0, -3, size, dtype=torch.float64)) for size in (n, m))
    start = whitened(w, c, g)
    frame, held = start.frame, start.directions[:, :rank]
    tail = Tail(start, rank)
    for step in range(3):
        w = w + 0.1 * matrix(m, n, seed=50 + step)
        value, gradient = tail.evaluate(w.float())
    later = w.clone().requires_grad_()
    expected = torch.linalg.svdvals(whitened_weight(later, c, g))[rank:].square().sum()
    (expected_gradient,) = torch.autograd.grad(expected, later)
    _, moved = frame.rows(w.float())
    frozen = frame.gradient(2 * (moved - held @ (held.T @ moved)))
    assert float(value) == pytest.approx(expected.item(), rel=0.02)
    assert 1 - cosine(gradient, expected_gradient) < 0.25 * (1 - cosine(frozen, expected_gradient))


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("rate", [0.0, 0.5, 1e9])
def test_proximal_tail_shrinks_what_truncation_discards(m, n, rate):
    w, c, g = layer(m, n)
    value, shrunk = make("tail", w, c, g).shrink(w.float(), rate)
    u, sigma, vt = torch.linalg.svd(whitened_weight(w, c, g), full_matrices=False)
    sigma[RANK:] /= 1 + rate
    expected = (u * sigma) @ vt
    assert (whitened_weight(shrunk.double(), c, g) - expected).norm() < 1e-4 * expected.norm()
    assert float(value) == pytest.approx(float(by_singular_values("tail", whitened_weight(w, c, g))), rel=1e-4)


@pytest.mark.parametrize(("m", "n"), [(96, 128), (128, 96)])
def test_a_proximal_tail_reports_a_value_near_the_true_one(m, n):
    """Too wide for its probes to span the space: random ones, the same every time."""
    w, c, g = layer(m, n)
    value, shrunk = make("tail", w, c, g).shrink(w.float(), 1.0)
    again, same = make("tail", w, c, g).shrink(w.float(), 1.0)
    expected = by_singular_values("tail", whitened_weight(w, c, g))
    assert float(value) == pytest.approx(float(expected), rel=0.25)
    assert torch.equal(value, again)
    assert torch.equal(shrunk, same)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("rate", [0.0, 0.3, 100.0])
def test_proximal_nuclear_thresholds_singular_values(m, n, rate):
    w, c, g = layer(m, n)
    value, shrunk = make("nuclear", w, c, g).shrink(w.float(), rate)
    u, sigma, vt = torch.linalg.svd(whitened_weight(w, c, g), full_matrices=False)
    expected = (u * (sigma - rate * sigma.mean()).clamp_min(0)) @ vt
    assert (whitened_weight(shrunk.double(), c, g) - expected).norm() < 1e-4 * sigma.norm()
    assert float(value) == pytest.approx(float(sigma.sum()), rel=1e-4)


def test_proximal_maps_are_the_minimisers_they_claim_to_be():
    """The shrunk weight is better than random neighbours at ½‖M' − M‖² + penalty(M')."""
    w, c, g = layer(8, 12)
    whitened, rate = whitened_weight(w, c, g), 0.3
    unit = float(torch.linalg.svdvals(whitened).mean())
    objectives = {
        "tail": lambda m: 0.5 * (m - whitened).square().sum() + 0.5 * rate * by_singular_values("tail", m),
        "nuclear": lambda m: 0.5 * (m - whitened).square().sum() + rate * unit * by_singular_values("nuclear", m),
    }
    for name, objective in objectives.items():
        best = whitened_weight(make(name, w, c, g).shrink(w.float(), rate)[1].double(), c, g)
        for seed in range(20):
            nearby = best + 0.03 * best.norm() * matrix(8, 12, seed) / matrix(8, 12, seed).norm()
            assert objective(best) < objective(nearby)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_stochastic_stable_rank_is_right_on_average(m, n):
    w, c, g = layer(m, n)
    w.requires_grad_()
    expected = by_singular_values("stable-rank", whitened_weight(w, c, g))
    (expected_gradient,) = torch.autograd.grad(expected, w)
    stochastic = StochasticStableRank(framed(w, c, g), torch.Generator().manual_seed(0), probes=40_000)
    value, gradient = stochastic.evaluate(w.detach().float())
    assert float(value) == pytest.approx(expected.item(), rel=0.01)
    assert (gradient - expected_gradient).norm() < 0.05 * expected_gradient.norm()


def test_the_noise_of_a_stochastic_trace_falls_with_its_probes():
    w, c, g = layer(24, 40)
    truth = float(by_singular_values("stable-rank", whitened_weight(w, c, g)))
    frame, generator = framed(w, c, g), torch.Generator().manual_seed(0)
    errors = []
    for probes in (4, 64):
        stochastic = StochasticStableRank(frame, generator, probes)
        values = [float(stochastic.evaluate(w.float())[0]) for _ in range(50)]
        errors.append(np.sqrt(np.mean((np.array(values) - truth) ** 2)) / truth)
    assert errors[1] < 0.5 * errors[0]  # a quarter, by the law of large numbers
    assert errors[1] < 0.2


def test_a_stochastic_trace_repeats_with_its_seed():
    w, c, g = layer(8, 12)
    first, again, other = (
        StochasticStableRank(framed(w, c, g), torch.Generator().manual_seed(seed)).evaluate(w.float())[0]
        for seed in (1, 1, 2)
    )
    assert first == again != other


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 10), rank=st.integers(1, 10), steps=st.integers(1, 14), seed=st.integers(0, 1000))
def test_lanczos_gives_orthonormal_vectors_and_the_projected_operator(k, rank, steps, seed):
    factor = matrix(k, min(k, rank), seed)
    a = factor @ factor.T  # of low rank: Lanczos stops early and must say so with zeros
    tridiagonal, vectors = surrogates.lanczos(lambda v: a @ v, matrix(k, 2, seed + 1), steps)
    for column in range(2):
        v = vectors[:, :, column].T
        found = v.norm(dim=0) > 0.5
        assert torch.allclose(v[:, found].T @ v[:, found], torch.eye(int(found.sum())).double(), atol=1e-6)
        assert torch.allclose(v.T @ a @ v, tridiagonal[column], atol=1e-4 * (1 + float(a.norm())))


@pytest.mark.parametrize("name", ["tail", *FUNCTIONS])
def test_a_zero_weight_has_no_gradient(name):
    w = torch.zeros(4, 6)
    value, gradient = make(name, w, moment(6, 1), moment(4, 2)).evaluate(w)
    assert float(value) == 0
    assert not gradient.any()


def test_a_singular_moment_still_makes_a_frame():
    w = matrix(6, 9)
    frame = framed(w, None, torch.diag(torch.tensor([1.0, 1, 1, 1, 0, -1e-12])))
    assert frame.primal.isfinite().all()
    rows, _ = frame.rows(w.float())
    assert (frame.primal @ rows - w).norm() < 1e-2 * w.norm()
    with pytest.raises(ValueError, match="positive"):
        framed(w, None, torch.full((6, 6), float("nan")))
