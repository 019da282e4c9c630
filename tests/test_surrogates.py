"""Surrogates against singular values and autograd in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prehab_export import surrogates
from prehab_export.config import SURROGATES


def matrix(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_singular_values(name, m, rank=3):
    sigma = torch.linalg.svdvals(m)
    return {
        "nuclear": sigma.sum(),
        "stable-rank": sigma.sum() ** 2 / sigma.square().sum(),
        "spectral": sigma.square().sum() / sigma[0] ** 2,
        "tail": sigma[rank:].square().sum(),
    }[name]


def evaluate(name, m, rank=3):
    if name == "nuclear":
        return surrogates.nuclear(m)
    if name == "stable-rank":
        return surrogates.stable_rank(m)
    if name == "tail":
        return surrogates.tail(m, surrogates.top_basis(m, rank))
    vector = torch.ones(m.shape[1], dtype=m.dtype)
    for _ in range(100):
        value, gradient, vector = surrogates.spectral(m, vector)
    return value, gradient


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize(("m", "n"), [(8, 12), (12, 8), (10, 10)])
def test_value_and_gradient(name, m, n):
    x = matrix(m, n).requires_grad_()
    expected = by_singular_values(name, x)
    (expected_gradient,) = torch.autograd.grad(expected, x)
    value, gradient = evaluate(name, x.detach())
    # The polar factor is good to float32's noise by design, the others to rounding.
    tolerance = 1e-3 if name in ("nuclear", "stable-rank") else 1e-6
    assert float(value) == pytest.approx(expected.item(), rel=tolerance)
    assert (gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm()


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 16), n=st.integers(1, 16), seed=st.integers(0, 1000), scale=st.floats(1e-6, 1e6))
def test_polar_factor_at_any_scale(m, n, seed, scale):
    x = matrix(m, n, seed) * scale
    u, sigma, vt = torch.linalg.svd(x, full_matrices=False)
    if sigma[-1] < 1e-4 * sigma[0]:
        return
    assert (surrogates.polar_factor(x) - u @ vt).abs().max() < 1e-3


def test_polar_factor_of_zero_is_zero():
    assert not surrogates.polar_factor(torch.zeros(3, 4)).any()


@settings(max_examples=40, deadline=None)
@given(m=st.integers(2, 12), n=st.integers(2, 12), seed=st.integers(0, 1000), data=st.data())
def test_a_stale_basis_bounds_the_truncation_loss(m, n, seed, data):
    rank = data.draw(st.integers(1, min(m, n)))
    x, moved = matrix(m, n, seed), matrix(m, n, seed) + 0.1 * matrix(m, n, seed + 1)
    value, _ = surrogates.tail(moved, surrogates.top_basis(x, rank))
    assert float(value) >= float(torch.linalg.svdvals(moved)[rank:].square().sum()) - 1e-9
