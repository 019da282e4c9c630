"""Layers that nothing goes through, or that nothing comes of: right factors or a sentence, never a traceback."""

from dataclasses import replace

import pytest
import torch
from small_models import build
from test_drift import CLASSIFY, IMAGE, STRONG, TEXT, along, batches_for
from test_refinement import as_samples

from converters.lowrank import Factors, low_rank_layers
from converters.retruncation import relative_error, retruncate
from converters.roots import damped, triangular_root, weighs
from converters.selection import select_layers
from prehab_export.compression.bases import factor_bases
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.calibration import CalibrationWarning, calibrate
from prehab_export.compression.decompositions import decompose_layers
from prehab_export.compression.drift import truncate_along
from prehab_export.compression.grid_refit import refit_to_grid
from prehab_export.compression.moments import InputMoment, centred
from prehab_export.compression.planning import plan_ranks
from prehab_export.compression.prehabilitation import prehab
from prehab_export.compression.refinement import block_refiner
from prehab_export.compression.truncation import truncate
from prehab_export.config.training import PrehabConfig, RefineConfig, TrainConfig
from prehab_export.config.truncate import TruncateConfig
from prehab_export.linalg.decomposition import decompose, decompose_jointly
from prehab_export.linalg.quantization_grid import GRIDS

pytestmark = pytest.mark.filterwarnings("ignore::prehab_export.compression.calibration.CalibrationWarning")


def expanded_llama():
    """As block expansion makes it: a block that adds nothing yet."""
    model = build("llama", num_hidden_layers=3)
    block = model.model.layers[1]
    block.self_attn.o_proj.weight.data.zero_()
    block.mlp.down_proj.weight.data.zero_()
    return model, TEXT


def dead_relu():
    """An OPT whose second block's MLP never fires on any sample."""
    model = build("opt")
    model.model.decoder.layers[1].fc1.bias.data.fill_(-1e4)
    return model, TEXT


def constant_input():
    """A ViT block whose norm lets nothing through but its bias: q, k and v see one vector, whatever the image."""
    model = build("vit")
    norm = model.vit.layers[1].layernorm_before
    norm.weight.data.zero_()
    norm.bias.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(30)
    return model, IMAGE


def dead_head():
    """A BERT whose classifier has just been initialised with zeros: no layer affects the loss."""
    model = build("bert")
    model.classifier.weight.data.zero_()
    return model, CLASSIFY


DEAD = {"expanded": expanded_llama, "relu": dead_relu, "constant": constant_input, "head": dead_head}


def calibrated(case):
    model, task = DEAD[case]()
    batches, layers = batches_for(task, count=3), select_layers(model)
    return model, task, batches, layers, calibrate(model, task, batches, layers).statistics


def assert_finite(truncation):
    for name, pair in truncation.factors.items():
        values = [pair.up, pair.down, *([] if pair.bias is None else [pair.bias])]
        assert all(bool(tensor.isfinite().all()) for tensor in values), name
    losses = [value for layer in truncation.layers for value in (layer.objective, layer.predicted_loss)]
    assert all(value is None or (value == value and value > -1e-6) for value in losses)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("objective", ["fisher", "activation"])
@pytest.mark.parametrize("case", DEAD)
def test_dead_layers_are_cut_like_any_other(case, objective, share):
    """With drift correction and without; twice the same; the budget is kept to."""
    model, task, batches, layers, statistics = calibrated(case)
    config = replace(STRONG, objective=objective, share_inputs=share)
    plan = truncate(Calibrated(model, task, statistics), config)
    assert_finite(plan)
    assert plan.summary()["selected_share_removed"] == pytest.approx(0.7, abs=0.1)
    first, again = (along(model, task, batches, layers, statistics, plan) for _ in range(2))
    assert_finite(first)
    for name, pair in first.factors.items():
        assert torch.equal(pair.up, again.factors[name].up)
        assert torch.equal(pair.down, again.factors[name].down)


@pytest.mark.parametrize("surrogate", ["tail", "nuclear", "stable-rank", "spectral", "stochastic-stable-rank"])
@pytest.mark.parametrize("case", DEAD)
def test_dead_layers_go_through_prehab(case, surrogate):
    model, task, batches, _layers, statistics = calibrated(case)
    updates = ["gradient", "proximal"] if surrogate in ("tail", "nuclear") else ["gradient"]
    for update in updates:
        config = PrehabConfig(
            surrogate=surrogate,
            update=update,
            strength=1e-2,
            refresh_every=2,
            refresh_samples=8,
            train=TrainConfig(steps=3, batch_size=8),
        )
        history = prehab(Calibrated(model, task, statistics), as_samples(batches), config, STRONG)
        assert all(torch.isfinite(torch.tensor(row["surrogate"])) for row in history)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("case", DEAD)
def test_dead_layers_go_through_what_comes_after_the_cut(case):
    """Block-wise refinement in the eigenbases, the grid, and a merge at the same rank."""
    model, task, batches, _layers, statistics = calibrated(case)
    plan = truncate(Calibrated(model, task, statistics), STRONG)
    schedule = RefineConfig(block_steps=2)
    refiner = block_refiner(schedule, statistics, seed=0)
    result = truncate_along(
        Calibrated(model, task, statistics), batches, plan, gradient_shrinkage=0.0, after_block=refiner
    )
    assert_finite(result)
    result.apply(model)
    assert all(bool(basis.into(tensor).isfinite().all()) for tensor, basis in factor_bases(model, statistics).items())
    fits = refit_to_grid(
        model, statistics, GRIDS["int8"], 0.0, replaceable=[name for name, _ in model.named_parameters()]
    )
    assert all(fit.refitted == fit.refitted for fit in fits)
    assert all(bool(p.isfinite().all()) for layer in low_rank_layers(model).values() for p in layer.parameters())


def test_zero_counts_as_the_identity_for_factors_and_as_zero_for_their_cost():
    generator = torch.Generator().manual_seed(0)
    weight, zero = torch.randn(6, 9, generator=generator), torch.zeros(9, 9)
    c = torch.randn(9, 9, generator=generator)
    c, g = c @ c.T, torch.zeros(6, 6)
    for moments, plain in (((zero, None), (None, None)), ((c, g), (c, None)), ((zero, g), (None, None))):
        found, expected = decompose(weight, *moments), decompose(weight, *plain)
        assert float(found.spectrum.sum()) == found.objective(2) == 0.0
        for own, other in zip(found.truncated(3), expected.truncated(3), strict=True):
            assert torch.equal(own, other)
    joint, expected = decompose_jointly([weight, weight], zero, [g, g]), decompose_jointly([weight, weight])
    assert joint.objective(1) == 0.0
    assert torch.equal(joint.down, expected.down)
    one = decompose_jointly([weight, 2 * weight], c, [g, torch.eye(6)])
    assert all(up.isfinite().all() for up in one.ups)
    pair = Factors(torch.randn(6, 4, generator=generator), torch.randn(4, 9, generator=generator))
    plain = retruncate(pair, 2)
    for C, G in ((zero, None), (None, g), (zero, g)):
        found = retruncate(pair, 2, C, G)
        assert torch.allclose(found.up @ found.down, plain.up @ plain.down, atol=1e-6)
        assert relative_error(pair, found, C, G) == pytest.approx(relative_error(pair, plain), rel=1e-6)


def test_a_root_is_triangular_and_regular_whatever_rounding_left():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    low = half @ half.T
    noisy = low + 1e-2 * torch.diag(torch.tensor([-1.0] * 4 + [1.0] * 4, dtype=torch.float64))
    for matrix, tolerance in ((low + torch.eye(8), 1e-12), (low, 1e-3), (noisy, 1e-1)):
        factor = triangular_root(matrix)
        assert torch.equal(factor, factor.tril())
        assert bool((factor.diagonal() > 0).all())
        assert (factor @ factor.T - matrix).norm() < tolerance * matrix.norm()
    assert torch.equal(triangular_root(torch.zeros(3, 3)), torch.eye(3, dtype=torch.float64))
    assert not weighs(torch.zeros(3, 3))
    assert torch.equal(damped(torch.zeros(2, 2), 0.5), 0.5 * torch.eye(2, dtype=torch.float64))


def test_what_float32_leaves_of_a_constant_is_nothing():
    """Features 0 and 1 never change, 2 and 3 do."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 4, generator=generator) * torch.tensor([0, 0, 1, 2]) + torch.tensor([40.0, -300, 5, 0])
    moment = InputMoment(rows.T @ rows / 500, rows.mean(0), 500, None)
    found = moment.centred()
    assert torch.count_nonzero(found[:2]) == torch.count_nonzero(found[:, :2]) == 0
    assert torch.allclose(found[2:, 2:], torch.cov(rows.T.double(), correction=0)[2:, 2:], rtol=1e-2, atol=1e-3)
    assert not weighs(centred(torch.ones(1, 1) * 900, torch.tensor([30.0])))


def test_no_part_in_the_loss_is_told():
    model, task = dead_head()
    layers = select_layers(model)
    with pytest.warns(CalibrationWarning, match="no layer affects the loss"):
        statistics = calibrate(model, task, batches_for(task, count=2), layers).statistics
    config = TruncateConfig(ratio=0.6)
    plan = plan_ranks(
        Calibrated(model, batches_for(task, count=2), statistics),
        decompose_layers(Calibrated(model, batches_for(task, count=2), statistics), config),
        config,
    )
    uniform = replace(config, allocation="uniform")
    assert (
        plan.ranks
        == plan_ranks(
            Calibrated(model, task, statistics), decompose_layers(Calibrated(model, task, statistics), uniform), uniform
        ).ranks
    )
    model, task = expanded_llama()
    with pytest.warns(CalibrationWarning, match=r"layers\.1\.self_attn\.q_proj and 4 more have no effect on the loss"):
        calibrate(model, task, batches_for(task, count=2), select_layers(model))
    model, task = dead_relu()
    with pytest.warns(CalibrationWarning, match=r"layers\.1\.fc2 has the same input for every token"):
        calibrate(model, task, batches_for(task, count=2), select_layers(model))
