"""Quantised graphs against PyTorch's own arithmetic, and the whole way from the command line."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from runs import stage_folder
from test_onnx_export import feed_of, make, relative
from test_pipeline import TEXT, invoke, vit_options

from converters.errors import InputError
from converters.onnx.export import export_onnx
from converters.onnx.modes import BLOCK, FILE_NAMES, MODES
from converters.onnx.quantize import quantize_graph
from converters.onnx.session import open_session
from prehab_export import quantization
from prehab_export.config import DataConfig, RunConfig, TruncateConfig

# Largest |Δ| over max |logit| on tiny random models, where nothing averages out.
ALLOWED = {"int8": 0.1, "int8-tables4": 1.0, "int8-static": 0.2, "int8-blocks": 0.1, "int4": 1.0, "float16": 2e-3}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """family → a factored graph with its inputs, made once."""
    made = {}

    def graph(family):
        if family not in made:
            path = tmp_path_factory.mktemp("graph") / "model.onnx"
            task = {"vit": "image-classification", "bert": "text-classification"}.get(family, "text-generation")
            export_onnx(make(family, 6), path, task)
            made[family] = path, {value.name: feed_of(value) for value in open_session(path).get_inputs()}
        return made[family]

    return graph


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["vit", "bert", "mistral"])
def test_every_mode_on_every_family(graphs, family, mode, tmp_path):
    source, feeds = graphs(family)
    target = quantize_graph(source, tmp_path / FILE_NAMES[mode], mode, lambda: iter([feeds]))
    actual = open_session(target).run(["logits"], feeds)[0]
    expected = open_session(source).run(["logits"], feeds)[0]
    assert np.abs(actual - expected).max() <= ALLOWED[mode] * np.abs(expected).max()
    kinds = {node.op_type for node in onnx.load(target).graph.node}
    wanted = {
        "int8": "DynamicQuantizeLinear",
        "int8-tables4": "DynamicQuantizeLinear" if family == "vit" else "GatherBlockQuantized",
        "int8-static": "QuantizeLinear",
        "int8-blocks": "MatMulNBits",
        "int4": "MatMulNBits",
        "float16": "Cast",
    }
    assert wanted[mode] in kinds
    assert "ConvInteger" not in kinds  # slower than the float32 operator
    assert not [file for file in tmp_path.iterdir() if file != target]


def test_tables_of_four_bits_leave_products_in_eight(graphs, tmp_path):
    source, _ = graphs("bert")
    counts = {}
    for mode in ("int8", "int8-tables4", "int4"):
        path = quantize_graph(source, tmp_path / f"{mode}.onnx", mode)
        kinds = [node.op_type for node in onnx.load(path).graph.node]
        counts[mode] = {kind: kinds.count(kind) for kind in ("MatMulInteger", "GatherBlockQuantized", "MatMulNBits")}
    assert counts["int8-tables4"]["MatMulInteger"] == counts["int8"]["MatMulInteger"] > 0
    assert counts["int8-tables4"]["GatherBlockQuantized"] == counts["int4"]["GatherBlockQuantized"] > 0
    assert counts["int8-tables4"]["MatMulNBits"] == 0


def one_product(path, weight):
    x = ir.val("x", ir.DataType.FLOAT, ["batch", weight.shape[0]])
    tensor = ir.tensor(weight, name="weight")
    value = ir.Value(name="weight", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph = ir.Graph([x], [], nodes=[], name="g", opset_imports={"": 20})
    graph.register_initializer(value)
    node = ir.node("MatMul", [x, value])
    graph.append(node)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(node.outputs[0])
    ir.save(ir.Model(graph, ir_version=10), path)


@pytest.mark.parametrize(("mode", "bits"), [("int8-blocks", 8), ("int4", 4)])
def test_block_weights_are_round_to_nearest(mode, bits, tmp_path):
    """Against the definition: in each block of 32 inputs the largest weight sets the step."""
    weight = np.random.default_rng(0).standard_normal((2 * BLOCK, 48)).astype(np.float32)
    one_product(tmp_path / "model.onnx", weight)
    target = quantize_graph(tmp_path / "model.onnx", tmp_path / "small.onnx", mode)
    x = np.eye(2 * BLOCK, dtype=np.float32)  # activations without a rounding error of their own
    (stored,) = onnxruntime.InferenceSession(target).run(None, {"x": x})
    steps = np.abs(weight.reshape(2, BLOCK, 48)).max(1, keepdims=True) / 2 ** (bits - 1)
    error = np.abs(stored - weight).reshape(2, BLOCK, 48)
    assert (error <= 1.01 * steps).all()
    assert error.mean() == pytest.approx((steps / 4).mean(), rel=0.15)


def test_float16_keeps_what_it_cannot_hold(tmp_path):
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    for scale, stored in ((1.0, np.float16), (1e6, np.float32)):
        one_product(tmp_path / "model.onnx", scale * weight)
        target = quantize_graph(tmp_path / "model.onnx", tmp_path / "half.onnx", "float16")
        (tensor,) = onnx.load(target).graph.initializer
        assert onnx.numpy_helper.to_array(tensor).dtype == stored
        (y,) = onnxruntime.InferenceSession(target).run(None, {"x": np.eye(64, dtype=np.float32)})
        np.testing.assert_allclose(y, scale * weight, rtol=1e-3, atol=1e-6 * scale)


def test_mistakes_are_named_and_leave_nothing(graphs, tmp_path):
    source, _ = graphs("vit")
    with pytest.raises(InputError, match="int7"):
        quantize_graph(source, tmp_path / "out" / "a.onnx", "int7")
    with pytest.raises(InputError, match="no ONNX graph"):
        quantize_graph(tmp_path / "none.onnx", tmp_path / "out" / "a.onnx", "int8")
    with pytest.raises(InputError, match="sample"):
        quantize_graph(source, tmp_path / "out" / "a.onnx", "int8-static")
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputError, match="not an ONNX file"):
        quantize_graph(tmp_path / "broken.onnx", tmp_path / "out" / "a.onnx", "int8")
    assert not list((tmp_path / "out").glob("*"))


def test_external_data_stays_external(tmp_path):
    source = tmp_path / "big" / "model.onnx"
    export_onnx(make("vit", 6), source, "image-classification", external_data_threshold=100)
    feeds = {value.name: feed_of(value) for value in open_session(source).get_inputs()}
    expected = open_session(source).run(["logits"], feeds)[0]
    for mode in MODES:
        target = quantize_graph(source, tmp_path / mode / "small.onnx", mode, lambda: iter([feeds]))
        assert sorted(file.name for file in target.parent.iterdir()) == ["small.onnx", "small.onnx_data"]
        actual = open_session(target).run(["logits"], feeds)[0]
        assert relative(actual, torch.from_numpy(expected)) < 1.0


def test_a_run_with_quantised_graphs(vit_folder, tmp_path, capsys):
    output = tmp_path / "run"
    options = [*vit_options(vit_folder), "-o", output, "--quantize", "int8", "--quantize", "int8-static"]
    assert invoke("run", *options) == 0
    report = json.loads((output / "report" / "report.json").read_text())
    rows = report["quantize"]["graphs"]
    assert [(row["model"], row["mode"]) for row in rows] == [
        ("dense", "int8"), ("compressed", "int8"), ("dense", "int8-static"), ("compressed", "int8-static")
    ]  # fmt: skip
    assert all(row["samples"] == 24 for row in rows)
    names = {"dense", "compressed", "dense int8", "compressed int8", "dense int8-static", "compressed int8-static"}
    assert {case["model"] for case in report["bench"]["cases"]} == names
    for mode in ("int8", "int8-static"):
        assert (output / "artifact" / "onnx" / FILE_NAMES[mode]).is_file()
        assert f"compressed {mode}" in (output / "report" / "report.md").read_text()
        assert FILE_NAMES[mode] in (output / "artifact" / "README.md").read_text()
    capsys.readouterr()


def test_a_text_run_with_blocks(bert_folder, reviews, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "SAMPLE", 8)
    output = tmp_path / "run"
    options = ["--task", "text-classification", "--data", reviews, "--calibration-samples", "16", "--threads", "1"]
    assert (
        invoke("quantize", bert_folder, *options, *TEXT, "-o", output, "--quantize", "int4", "--rank-multiple", "2")
        == 0
    )
    rows = json.loads((stage_folder(output, "quantize") / "quantize.json").read_text())["graphs"]
    assert [row["model"] for row in rows] == ["dense", "compressed"]


def test_ranks_fill_their_blocks_unless_told_otherwise():
    def multiple(*modes, own=1):
        config = RunConfig(
            "m", "text-generation", DataConfig("d"), truncate=TruncateConfig(rank_multiple=own), quantize=modes
        )
        return config.cut.multiple

    assert multiple() == multiple("int8", "float16") == 1
    assert multiple("int4") == multiple("int8", "int8-blocks") == BLOCK
    assert multiple("int4", own=8) == 8


def test_an_unknown_mode_is_refused(vit_folder, tmp_path, capsys):
    assert invoke("run", *vit_options(vit_folder), "-o", tmp_path / "run", "--quantize", "int3") == 2
    assert "int8-blocks" in capsys.readouterr().err
