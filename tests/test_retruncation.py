import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.lowrank import Factors
from converters.retruncation import relative_error, retruncate


def random(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moment(generator, size, rank):
    """A positive semi-definite matrix of the given rank with a wide spectrum."""
    root = random(generator, size, rank) * torch.logspace(0, -2, rank, dtype=torch.float64)
    return root @ root.T


def distance(delta, C, G):
    """sqrt(tr(G Δ C Δᵀ)) as written."""
    C = torch.eye(delta.shape[1], dtype=delta.dtype) if C is None else C
    G = torch.eye(delta.shape[0], dtype=delta.dtype) if G is None else G
    return torch.trace(G @ delta @ C @ delta.T).clamp_min(0).sqrt().item()


def slack(W, C, G):
    """√ε of the largest distance there could be: a singular metric is known no better, whatever it sees of W."""
    scale = W.norm() * math.prod(1 if A is None else torch.linalg.matrix_norm(A, 2).sqrt() for A in (C, G))
    return 1e-7 * scale.item()


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def least_distance(W, rank, C, G):
    """Brute force: the tail of the whitened full matrix."""
    whitened = W if C is None else W @ root(C)
    whitened = whitened if G is None else root(G) @ whitened
    return torch.linalg.svdvals(whitened)[rank:].norm().item()


@st.composite
def problems(draw):
    m, n, inner = draw(st.integers(2, 10)), draw(st.integers(2, 10)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    factors = Factors(random(generator, m, inner), random(generator, inner, n))
    C = moment(generator, n, draw(st.integers(1, n))) if draw(st.booleans()) else None
    G = moment(generator, m, draw(st.integers(1, m))) if draw(st.booleans()) else None
    return factors, draw(st.integers(1, 8)), C, G


@settings(deadline=None, max_examples=200)
@given(problems())
def test_no_product_of_that_rank_is_nearer(problem):
    factors, rank, C, G = problem
    W = factors.up @ factors.down
    cut = retruncate(factors, rank, C, G)
    assert cut.rank == min(rank, factors.rank, *W.shape)
    total = distance(W, C, G)
    reached = distance(W - cut.up @ cut.down, C, G)
    assert reached == pytest.approx(least_distance(W, rank, C, G), abs=slack(W, C, G))
    assert total * relative_error(factors, cut, C, G) == pytest.approx(reached, abs=slack(W, C, G))


@settings(deadline=None, max_examples=50)
@given(problems(), st.integers(0, 999))
def test_moving_away_costs(problem, seed):
    factors, rank, C, G = problem
    W = factors.up @ factors.down
    cut = retruncate(factors, rank, C, G)
    generator = torch.Generator().manual_seed(seed)
    up = cut.up + 1e-2 * random(generator, *cut.up.shape)
    down = cut.down + 1e-2 * random(generator, *cut.down.shape)
    assert distance(W - cut.up @ cut.down, C, G) <= distance(W - up @ down, C, G) + slack(W, C, G)


@settings(deadline=None, max_examples=50)
@given(problems())
def test_the_result_is_balanced(problem):
    factors, rank, C, G = problem
    cut = retruncate(factors, rank, C, G)
    left, right = cut.up.T @ cut.up, cut.down @ cut.down.T
    torch.testing.assert_close(left, right, rtol=0, atol=1e-9 * left.max().item() + 1e-12)


def test_nothing_is_lost_where_the_rank_suffices():
    generator = torch.Generator().manual_seed(0)
    factors = Factors(random(generator, 9, 3), random(generator, 3, 7), torch.ones(9))
    cut = retruncate(factors, 5, moment(generator, 7, 7), moment(generator, 9, 9))
    torch.testing.assert_close(cut.up @ cut.down, factors.up @ factors.down)
    assert cut.bias is factors.bias


@settings(deadline=None, max_examples=50)
@given(problems(), st.integers(1, 9), st.integers(0, 999))
def test_blocks_stand_for_the_block_diagonal_metric(problem, split, seed):
    factors, rank, C, _ = problem
    m = factors.up.shape[0]
    sizes = (min(split, m - 1), m - min(split, m - 1))
    generator = torch.Generator().manual_seed(seed)
    blocks = [moment(generator, size, size) for size in sizes]
    whole = torch.block_diag(*blocks)
    cut, same = retruncate(factors, rank, C, blocks), retruncate(factors, rank, C, whole)
    W = factors.up @ factors.down
    total = distance(W, C, whole)
    reached = distance(W - cut.up @ cut.down, C, whole)
    assert reached == pytest.approx(least_distance(W, rank, C, whole), abs=slack(W, C, whole))
    assert total * relative_error(factors, cut, C, blocks) == pytest.approx(reached, abs=slack(W, C, whole))
    assert reached == pytest.approx(distance(W - same.up @ same.down, C, whole), abs=slack(W, C, whole))


def test_zero_stays_zero():
    zero = Factors(torch.zeros(4, 2), torch.zeros(2, 3))
    cut = retruncate(zero, 1)
    assert relative_error(zero, cut) == 0
    assert (cut.up @ cut.down).abs().max() == 0


def test_dtype_is_kept():
    cut = retruncate(Factors(torch.randn(6, 3).bfloat16(), torch.randn(3, 5).bfloat16()), 2)
    assert cut.up.dtype == cut.down.dtype == torch.bfloat16
