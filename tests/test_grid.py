"""Grids against ONNX Runtime's own quantisers, factors on them against brute force, and the whole way through a run."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import stage_folder
from test_onnx_export import make
from test_pipeline import invoke, vit_options
from test_quantize import one_product

from converters.lowrank import low_rank_layers
from converters.onnx.export import export_onnx
from converters.onnx.form import GraphForm
from converters.onnx.modes import FILE_NAMES
from converters.onnx.quantize import quantize_graph
from converters.onnx.runtime import open_session
from converters.onnx.weights import replace_weights, weight_names
from prehab_export.compression.grid_refit import refit_to_grid
from prehab_export.compression.moments import InputMoment, Statistics
from prehab_export.inputs.evaluation import Metrics
from prehab_export.linalg.decomposition import objective_value
from prehab_export.linalg.quantization_grid import (
    GRIDS,
    Feedback,
    Pair,
    Weighing,
    fed_back,
    fit_to_grid,
    hartley,
    refitted_down,
    refitted_ups,
    spread,
)
from prehab_export.linalg.shrinkage import Sampling
from prehab_export.pipeline.session import Session

GRID_NAMES = sorted(GRIDS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size, seed, decades=2.0):
    """A second moment whose eigenvalues span so many decades."""
    basis = torch.linalg.qr(normal(size, size, seed=seed))[0]
    return (basis * torch.logspace(0, -decades, size, dtype=torch.float64)) @ basis.T


def problem(seed, m=24, r=8, n=40, layers=1):
    ups = tuple(normal(m, r, seed=seed + 10 * i) for i in range(layers))
    weighing = Weighing(moment(n, seed + 1), tuple(moment(m, seed + 2 + i) for i in range(layers)))
    return Pair(ups, normal(r, n, seed=seed + 5)), weighing


def stored_weight(graph):
    """The in×out weight of a one-product graph, as the runtime has it."""
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    packed = next((value for name, value in tensors.items() if name.endswith(("_Q4", "_Q8"))), None)
    if packed is None:
        return tensors["weight_quantized"] * tensors["weight_scale"]
    scales = next(value for name, value in tensors.items() if name.endswith("_scales"))
    four = any(name.endswith("_Q4") for name in tensors)
    numbers = np.stack([packed & 15, packed >> 4], -1) - 8.0 if four else packed - 128.0
    outputs = scales.shape[0]
    return (numbers.reshape(outputs, -1, 32) * scales.reshape(outputs, -1, 1)).reshape(outputs, -1).T


@pytest.mark.parametrize("mode", GRID_NAMES)
@pytest.mark.parametrize("inputs", [64, 50])  # the second ends in a block that is not full
def test_a_grid_is_the_quantisers(mode, inputs, tmp_path):
    weight = (normal(48, inputs) * torch.logspace(-3, 2, 48, dtype=torch.float64)[:, None]).float()
    weight[3] = 0
    weight[4] = weight[4].abs()
    weight[5, :2] = torch.tensor([9e3, -9e3])  # two entries may both set the step
    one_product(tmp_path / "model.onnx", weight.T.contiguous().numpy())
    sample = [{"x": np.ones((2, inputs), np.float32)}]
    graph = quantize_graph(tmp_path / "model.onnx", tmp_path / "small.onnx", mode, lambda: iter(sample))
    stored = stored_weight(onnx.load(graph))[:inputs]
    np.testing.assert_array_equal(stored.astype(np.float32), GRIDS[mode].snap(weight).T.numpy())


@pytest.mark.parametrize("mode", GRID_NAMES)
@pytest.mark.parametrize("family", ["vit", "bert", pytest.param("mistral", marks=pytest.mark.slow)])
def test_factors_on_a_grid_come_through_the_quantiser_as_they_are(family, mode, tmp_path):
    """Every factor is a fixed point of its grid, nothing else has changed, and a graph with its weights replaced is the
    graph that an export of the refitted model gives."""
    model, task = make(family, 32), {"vit": "image-classification", "bert": "text-classification"}.get(family)
    source = tmp_path / "model.onnx"
    export_onnx(model, task or "text-generation", source)
    replaceable = weight_names(source)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fits = refit_to_grid(model, identity_statistics(model), GRIDS[mode], 0.0, replaceable=replaceable)
    layers = low_rank_layers(model)
    assert sorted(name for fit in fits for name in fit.layers) == sorted(layers)
    for layer in layers.values():
        for weight in (layer.up.weight, layer.down.weight):
            torch.testing.assert_close(GRIDS[mode].snap(weight), weight.detach(), rtol=1e-6, atol=0)
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed <= {f"{name}.{part}" for name in layers for part in ("up.weight", "up.bias", "down.weight")}
    new = replace_weights(source, tmp_path / "new.onnx", model.state_dict())
    export_onnx(model, task or "text-generation", tmp_path / "again.onnx")
    assert_same_weights(new, tmp_path / "again.onnx")


def assert_same_weights(one, other):
    tensors = [ir.load(path).graph.initializers for path in (one, other)]
    assert list(tensors[0]) == list(tensors[1])
    for name, value in tensors[0].items():
        np.testing.assert_array_equal(value.const_value.numpy(), tensors[1][name].const_value.numpy(), err_msg=name)


def identity_statistics(model):
    layers = low_rank_layers(model)
    inputs = {
        name: InputMoment(torch.eye(layer.in_features), torch.zeros(layer.in_features), 100, Sampling(10, 0.1, 1.0))
        for name, layer in layers.items()
    }
    return Statistics(inputs, {name: name for name in layers})


@pytest.mark.parametrize("mode", GRID_NAMES)
def test_what_feedback_gives_is_on_the_grid_and_better_than_the_nearest(mode):
    grid, weight = GRIDS[mode], normal(16, 72)
    hessian = moment(72, 1)
    found = fed_back(weight, Feedback.along(hessian), grid)
    torch.testing.assert_close(grid.snap(found).double(), found, rtol=1e-6, atol=0)
    torch.testing.assert_close(grid.steps(found), grid.steps(weight), rtol=1e-6, atol=0)
    nearest = grid.snap(weight).double()
    assert objective_value(weight - found, hessian) < 0.9 * objective_value(weight - nearest, hessian)


def test_feedback_without_correlation_is_the_nearest():
    weight = normal(8, 64)
    for grid in GRIDS.values():
        diagonal = torch.linspace(1, 2, 64, dtype=torch.float64).diag()
        torch.testing.assert_close(fed_back(weight, Feedback.along(diagonal), grid).float(), grid.snap(weight))


@pytest.mark.parametrize("layers", [1, 3])
def test_spreading_keeps_products_and_evens_out_the_ranks(layers):
    pair, weighing = problem(0, layers=layers)
    turned = spread(pair, weighing)
    for up, new in zip(pair.ups, turned.ups, strict=True):
        torch.testing.assert_close(new @ turned.down, up @ pair.down)
    c = weighing.second_moment
    k = turned.down @ (c + c.diagonal().mean() * torch.eye(len(c))) @ turned.down.T
    m = weighing.ups_gram(turned.ups)
    torch.testing.assert_close(m, k, rtol=1e-6, atol=1e-6 * float(k.trace()))
    assert float(k.diagonal().max() / k.diagonal().min()) < 1.5
    before_k = pair.down @ (c + c.diagonal().mean() * torch.eye(len(c))) @ pair.down.T
    assert (m.diagonal() * k.diagonal()).sum() < (weighing.ups_gram(pair.ups).diagonal() * before_k.diagonal()).sum()


@pytest.mark.parametrize("size", [1, 2, 7, 32, 48])
def test_the_turn_is_orthogonal(size):
    turn = hartley(size)
    torch.testing.assert_close(turn @ turn.T, torch.eye(size, dtype=torch.float64))


def test_refitted_ups_are_the_least_squares_solution():
    """Against the normal equations of the vectorised problem, with a G that must not matter."""
    pair, weighing = problem(3, m=5, r=3, n=6)
    down = pair.down + 0.3 * normal(3, 6, seed=9)
    (found,) = refitted_ups(pair, down, weighing.second_moment)
    root_c, root_g = (torch.linalg.cholesky(x) for x in (weighing.second_moment, weighing.gradients[0]))
    design = torch.kron(root_g.T.contiguous(), (down @ root_c).T.contiguous())
    target = root_g.T @ (pair.ups[0] @ pair.down) @ root_c
    exact = torch.linalg.lstsq(design, target.reshape(-1, 1)).solution.reshape(5, 3)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)


def test_a_refitted_down_is_the_least_squares_solution():
    pair, weighing = problem(4, m=5, r=3, n=6, layers=2)
    ups = tuple(up + 0.3 * normal(5, 3, seed=20 + i) for i, up in enumerate(pair.ups))
    found = refitted_down(pair, ups, weighing)
    roots = [torch.linalg.cholesky(g).T for g in weighing.gradients]
    design = torch.cat([root @ up for root, up in zip(roots, ups, strict=True)])
    target = torch.cat([root @ up @ pair.down for root, up in zip(roots, pair.ups, strict=True)])
    torch.testing.assert_close(found, torch.linalg.lstsq(design, target).solution, rtol=1e-6, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6), mode=st.sampled_from(GRID_NAMES), r=st.integers(1, 40), n=st.integers(2, 70),
    layers=st.integers(1, 2), scale=st.sampled_from([1e-6, 1.0, 1e4]), rank_lost=st.booleans(),
)  # fmt: skip
def test_the_refit_never_costs_more(seed, mode, r, n, layers, scale, rank_lost):
    pair, weighing = problem(seed, m=9, r=r, n=n, layers=layers)
    down = pair.down * scale
    if rank_lost:
        down[-1] = 0
    pair, grid = Pair(pair.ups, down), GRIDS[mode]
    fitted = fit_to_grid(pair, weighing, grid)
    for one, other in zip((*fitted.ups, fitted.down), (*pair.ups, pair.down), strict=True):
        assert one.shape == other.shape
        assert one.isfinite().all()
    stored = fitted.snapped(grid)
    assert weighing.cost(pair, stored, grid) <= weighing.cost(pair, pair.snapped(grid), grid) * (1 + 1e-6)


@pytest.mark.parametrize("mode", GRID_NAMES)
def test_the_refit_pays_on_ranks_of_unlike_size(mode):
    pair, weighing = problem(1, m=64, r=32, n=96)
    pair = Pair(pair.ups, torch.logspace(0, -1, 32, dtype=torch.float64)[:, None] * pair.down)
    grid = GRIDS[mode]
    plain, fitted = (
        weighing.objective(pair, stored) for stored in (pair.snapped(grid), fit_to_grid(pair, weighing, grid))
    )
    assert fitted < 0.8 * plain


def test_a_layer_that_does_nothing_is_left_alone():
    pair, weighing = problem(0)
    for dead, weighed in (
        (Pair(pair.ups, 0 * pair.down), weighing),
        (pair, Weighing(weighing.second_moment, (torch.zeros(24, 24, dtype=torch.float64),))),
    ):
        fitted = fit_to_grid(dead, weighed, GRIDS["int4"])
        torch.testing.assert_close(fitted.down, GRIDS["int4"].snap(dead.down).double())


def test_a_bias_takes_the_mean_of_what_is_lost():
    model = make("vit", 32)
    statistics = identity_statistics(model)
    name, layer = next((name, layer) for name, layer in low_rank_layers(model).items() if layer.bias is not None)
    mean = torch.linspace(-1, 1, layer.in_features)
    moments = torch.eye(layer.in_features) + torch.outer(mean, mean)
    statistics.inputs[name] = InputMoment(moments, mean, 100, Sampling(10, 0.1, 1.0))
    expected = layer(mean)
    refit_to_grid(model, statistics, GRIDS["int4"], 0.0, replaceable=dict(model.named_parameters()))
    torch.testing.assert_close(layer(mean), expected)


def test_layers_whose_weights_the_graph_does_not_name_stay():
    model = make("vit", 32)
    names = list(low_rank_layers(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    replaceable = set(before) - {f"{names[0]}.up.weight"}
    fits = refit_to_grid(model, identity_statistics(model), GRIDS["int4"], 0.0, replaceable=replaceable)
    assert [name for fit in fits for name in fit.layers] == names[1:]
    assert model.state_dict()[f"{names[0]}.down.weight"].equal(before[f"{names[0]}.down.weight"])


def test_weights_are_replaced_whole_or_not_at_all(tmp_path):
    model = make("mistral", 6)
    export_onnx(model, "text-generation", tmp_path / "model.onnx", GraphForm(external_data_threshold=100))
    state = model.state_dict()
    same = replace_weights(tmp_path / "model.onnx", tmp_path / "new" / "same.onnx", state)
    assert_same_weights(tmp_path / "model.onnx", same)
    assert (tmp_path / "new" / "same.onnx_data").is_file()
    stacked = next(name for name in state if "q_proj.down" in name)
    with pytest.raises(ValueError, match="all parts of a stack"):
        replace_weights(tmp_path / "model.onnx", tmp_path / "part" / "a.onnx", {stacked: state[stacked]})
    up = next(name for name in state if "o_proj.up" in name)
    with pytest.raises(ValueError, match="cannot take the place"):
        replace_weights(tmp_path / "model.onnx", tmp_path / "part" / "a.onnx", {up: state[up][1:]})
    assert not (tmp_path / "part").exists()


@pytest.mark.slow
@pytest.mark.parametrize("gain", [-1.0, 1.0])
def test_a_run_keeps_the_refit_only_where_held_out_samples_gain(vit_folder, tmp_path, monkeypatch, capsys, gain):
    output, measured = tmp_path / "run", Session.graph_metrics

    def metrics(session, graph, description, samples=None):
        found = measured(session, graph, description, samples)
        if samples is None:
            return found
        loss = 2.0 - gain if "refitted" in graph.parent.name else 2.0
        return Metrics(found.metric, found.value, loss, found.units, found.samples)

    monkeypatch.setattr(Session, "graph_metrics", metrics)
    options = [*vit_options(vit_folder), "-o", output, "--rank-multiple", "2", "--quantize", "int4"]
    assert invoke("quantize", *options) == 0
    stage = stage_folder(output, "quantize")
    dense, compressed = json.loads((stage / "quantize.json").read_text())["graphs"]
    assert dense["refit"] is None
    refit = compressed["refit"]
    assert refit["kept"] == (gain > 0)
    assert refit["layers"] > 0
    assert refit["objective_refitted"] < refit["objective_plain"]
    assert compressed["loss"] == refit["refitted" if refit["kept"] else "plain"]["loss"]
    assert refit["refitted"]["loss"] != refit["plain"]["loss"]
    assert sorted(file.name for file in (stage / "compressed").iterdir()) == [FILE_NAMES["int4"]]
    plain = tmp_path / "plain.onnx"
    quantize_graph(stage_folder(output, "export") / "model" / "onnx" / "model.onnx", plain, "int4")
    is_plain = plain.read_bytes() == (stage / "compressed" / FILE_NAMES["int4"]).read_bytes()
    assert is_plain == (gain < 0)
    assert open_session(stage / "compressed" / FILE_NAMES["int4"]).get_outputs()[0].name == "logits"
    assert invoke("quantize", output, "--set", "quantize_refit=false") == 0
    stage = stage_folder(output, "quantize")
    rows = json.loads((stage / "quantize.json").read_text())["graphs"]
    assert [row["refit"] for row in rows] == [None, None]
    assert (stage / "compressed" / FILE_NAMES["int4"]).read_bytes() == plain.read_bytes()
    capsys.readouterr()
