import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import build, inputs, linears, logits, svd_factors, truncated
from torch import nn
from transformers.pytorch_utils import Conv1D

from converters.errors import InputError
from converters.lowrank import (
    Factors,
    LowRankLinear,
    balance,
    dense_weight,
    densify,
    factorize,
    factorize_empty,
    factors_of,
    low_rank_layers,
)

FAMILIES = ["bert", "vit", "llama", "gpt2"]


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_the_product_of_its_factors(bias):
    layer = LowRankLinear(8, 12, 3, bias=bias)
    x = torch.randn(5, 8)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert (layer.in_features, layer.out_features, layer.rank) == (8, 12, 3)


def test_rank_zero_is_refused():
    with pytest.raises(ValueError, match="rank"):
        LowRankLinear(8, 12, 0)


def test_dense_weight_is_a_view():
    linear, conv = nn.Linear(4, 6), Conv1D(6, 4)
    assert dense_weight(linear) is linear.weight
    assert dense_weight(conv).shape == (6, 4)
    assert dense_weight(conv).data_ptr() == conv.weight.data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_factors_compute_the_dense_model(family):
    model = build(family)
    want = logits(model)
    truncated(model, rank=32)
    assert len(low_rank_layers(model)) == len(linears(build(family)))
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_densify_goes_back(family):
    model = build(family)
    original = copy.deepcopy(model)
    want = logits(truncated(model))
    densify(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    for name, layer in linears(original).items():
        assert type(model.get_submodule(name)) is type(layer)
    original.load_state_dict(model.state_dict())
    assert torch.equal(logits(original), logits(model))


def test_a_layer_with_several_names_is_replaced_under_each():
    """Under two names in one parent, and in two parents one of which has two names itself."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(2)])
    model.blocks[1][0] = model.again = model.blocks[0][0]
    model.alias = model.blocks[1]
    shared, own = model.again, model.alias[1]
    x = torch.randn(3, 16)
    before = sum(parameter.numel() for parameter in model.parameters())
    expected = [shared(x), own(x)]
    factors = {"blocks.0.0": svd_factors(shared, 16), "blocks.1.1": svd_factors(own, 16)}
    for change in (
        lambda: factorize(model, factors),
        lambda: densify(model),
        lambda: factorize_empty(model, {"blocks.0.0": 4, "blocks.1.1": 4}),
    ):
        change()
        assert model.again is model.blocks[0][0] is model.blocks[1][0] is model.alias[0]
        assert model.alias[1] is model.blocks[1][1]
        assert not any(layer is shared or layer is own for layer in model.modules())
        if not isinstance(model.again, LowRankLinear) or model.again.rank == 16:
            assert torch.allclose(model.again(x), expected[0], atol=1e-5)
            assert torch.allclose(model.alias[1](x), expected[1], atol=1e-5)
    assert sum(parameter.numel() for parameter in model.parameters()) == before - 2 * (16 * 16 - 4 * 32)
    assert list(low_rank_layers(model)) == ["blocks.0.0", "blocks.1.1"]


def test_empty_factors_allocate_nothing():
    with torch.device("meta"):
        model = build("gpt2")
    ranks = dict.fromkeys(linears(model), 5)
    factorize_empty(model, ranks)
    assert {name: layer.rank for name, layer in low_rank_layers(model).items()} == ranks
    assert all(p.is_meta for p in model.parameters())
    reference = truncated(build("gpt2"), rank=5)
    shapes = {name: p.shape for name, p in reference.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


def test_dtype_and_training_mode_are_kept():
    model = build("bert", torch.bfloat16).train()
    truncated(model)
    assert all(layer.training and layer.down.training for layer in low_rank_layers(model).values())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_factors_of_returns_what_was_put_in():
    model = build("llama")
    factors = {name: svd_factors(layer, 4) for name, layer in linears(model).items()}
    factorize(model, factors)
    for name, pair in factors_of(model).items():
        assert torch.equal(pair.up, factors[name].up)
        assert torch.equal(pair.down, factors[name].down)
        assert pair.bias is None


def test_gradients_reach_both_factors():
    model = truncated(build("bert"))
    model(**inputs(model)).logits.sum().backward()
    layer = low_rank_layers(model)["bert.encoder.layer.0.attention.self.query"]
    assert layer.up.weight.grad.abs().sum() > 0
    assert layer.down.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "factors", "message"),
    [
        ("bert.nowhere", Factors(torch.ones(32, 2), torch.ones(2, 32), torch.ones(32)), "no layer named bert.nowhere"),
        ("bert.embeddings", Factors(torch.ones(32, 2), torch.ones(2, 32)), "not a dense linear"),
        ("bert.pooler.dense", Factors(torch.ones(31, 2), torch.ones(2, 32), torch.ones(31)), "do not multiply to"),
        ("bert.pooler.dense", Factors(torch.ones(32, 3), torch.ones(2, 32), torch.ones(32)), "do not multiply to"),
        ("bert.pooler.dense", Factors(torch.ones(32, 2), torch.ones(2, 32)), "bias"),
    ],
)
def test_misfits_are_named(name, factors, message):
    with pytest.raises(InputError, match=message):
        factorize(build("bert"), {name: factors})


def test_empty_factors_need_a_dense_linear():
    with pytest.raises(InputError, match="not a dense linear"):
        factorize_empty(build("bert"), {"bert.embeddings": 2})


@settings(deadline=None, max_examples=50)
@given(m=st.integers(1, 12), r=st.integers(1, 8), n=st.integers(1, 12), seed=st.integers(0, 999))
def test_balanced_factors(m, r, n, seed):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(m, r, generator=generator, dtype=torch.float64) * 1e3
    down = torch.randn(r, n, generator=generator, dtype=torch.float64) * 1e-2
    if seed % 3 == 0:
        down[0] = 0
    new_up, new_down = balance(up, down)
    product = up @ down
    k = min(m, r, n)
    sigma = torch.diag(torch.linalg.svdvals(product)[:k])
    scale = sigma.max().item() + 1e-300
    assert new_up.shape == (m, k)
    assert new_down.shape == (k, n)
    torch.testing.assert_close(new_up @ new_down, product, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(new_up.T @ new_up, sigma, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(new_down @ new_down.T, sigma, rtol=0, atol=1e-12 * scale)


def test_balance_keeps_the_dtype():
    up, down = balance(torch.randn(6, 2).half(), torch.randn(2, 5).half())
    assert up.dtype == down.dtype == torch.float16
