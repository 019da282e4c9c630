"""AdamW in the eigenbases of G and C, against plain AdamW in coordinates that are turned by hand, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_drift import prepared
from torch import nn

from converters.lowrank import factors_of, low_rank_layers
from prehab_export.compression.bases import factor_bases
from prehab_export.compression.training import frozen_copy
from prehab_export.linalg.eigenbasis_adamw import Basis, EigenbasisAdamW

OPTIONS = {"lr": 0.05, "weight_decay": 0.1}


def rotation(size, generator):
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def quadratic(generator, m=5, n=7):
    """½ tr((W − T)ᵀ G (W − T) C) with curvatures of spread-out eigenvalues, and the eigenvectors of G and C."""
    left, right = rotation(m, generator), rotation(n, generator)
    g = left * torch.logspace(0, -4, m, dtype=torch.float64) @ left.T
    c = right * torch.logspace(0, -4, n, dtype=torch.float64) @ right.T
    target = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return lambda w: 0.5 * ((w - target).T @ g @ (w - target) @ c).trace(), left, right


def minimised(loss, weight, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(weight()).backward()
        optimizer.step()
    return weight().detach()


@given(st.integers(0, 10**6), st.sampled_from(["left", "right", "both", "none"]))
def test_it_is_adamw_on_turned_coordinates(seed, sides):
    generator = torch.Generator().manual_seed(seed)
    loss, _, _ = quadratic(generator)
    left = rotation(5, generator) if sides in ("left", "both") else None
    right = rotation(7, generator) if sides in ("right", "both") else None
    basis = Basis(left, right)
    start = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    own = nn.Parameter(start.clone())
    got = minimised(loss, lambda: own, EigenbasisAdamW([own], {own: basis}, **OPTIONS), 7)
    turned = nn.Parameter(basis.into(start))
    expected = minimised(loss, lambda: basis.back(turned), torch.optim.AdamW([turned], **OPTIONS), 7)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_parameters_without_a_basis_are_stepped_as_by_adamw():
    start, loss = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), lambda w: w.square().sum()
    results = []
    for make in (lambda p: EigenbasisAdamW([p], {}, **OPTIONS), lambda p: torch.optim.AdamW([p], **OPTIONS)):
        parameter = nn.Parameter(start.clone())
        results.append(minimised(loss, lambda p=parameter: p, make(parameter), 5))
    assert torch.equal(*results)


def test_an_ill_conditioned_quadratic_falls_faster():
    generator = torch.Generator().manual_seed(3)
    loss, left, right = quadratic(generator)
    start = torch.zeros(5, 7, dtype=torch.float64)
    losses = []
    for bases in (False, True):
        own = nn.Parameter(start.clone())
        chosen = {own: Basis(left, right)} if bases else {}
        losses.append(float(loss(minimised(loss, lambda w=own: w, EigenbasisAdamW([own], chosen, lr=0.05), 40))))
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_bases_of_factors_make_the_moments_diagonal(kind):
    model, _task, _batches, _layers, statistics, plan = prepared(kind)
    student = plan.apply(frozen_copy(model))
    before = {name: pair.up @ pair.down for name, pair in factors_of(student).items()}
    bases = factor_bases(student, statistics)
    for name, layer in low_rank_layers(student).items():
        up, down = bases[layer.up.weight], bases[layer.down.weight]
        assert up.right is None
        assert down.left is None
        for vectors, moment in (
            (up.left, statistics.gradients[name]),
            (down.right, statistics.input_of(name).second_moment),
        ):
            turned = vectors.T @ moment @ vectors
            off = turned - turned.diagonal().diag()
            assert off.abs().max() < 1e-4 * turned.diagonal().max()
            torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(vectors)), atol=1e-5, rtol=0)
    # There and back again leaves the weights.
    for name, layer in low_rank_layers(student).items():
        product = bases[layer.up.weight].back(bases[layer.up.weight].into(layer.up.weight)) @ layer.down.weight
        torch.testing.assert_close(product, before[name], atol=1e-4, rtol=1e-4)
