"""Quantised graphs against PyTorch's own arithmetic, and the whole way from the command line."""

import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from google.protobuf.message import DecodeError
from runs import stage_folder
from test_onnx_export import feed_of, make, relative
from test_pipeline import QUICK, TEXT, invoke, vit_options

from converters.errors import InputError
from converters.onnx import write
from converters.onnx.export import export_onnx
from converters.onnx.form import GraphForm
from converters.onnx.graph_facts import read_graph
from converters.onnx.modes import BLOCK, FILE_NAMES, MODES
from converters.onnx.quantize import quantize_graph
from converters.onnx.quantized_weights import VECTORS, FloatWeights, QuantizedWeights, count_quantized
from converters.onnx.runtime import open_session
from prehab_export.config.data import DataConfig
from prehab_export.config.run import RunConfig
from prehab_export.config.truncate import TruncateConfig
from prehab_export.pipeline.stages import quantize as quantization
from prehab_export.system.errors import out_of_space

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
            export_onnx(make(family, 6), task, path)
            made[family] = path, {value.name: feed_of(value) for value in open_session(path).get_inputs()}
        return made[family]

    return graph


@pytest.mark.parametrize("free", [0, 10**12])
def test_half_a_file_is_told_as_the_full_disk_that_it_is(graphs, free, tmp_path, monkeypatch):
    """onnx writes a graph with its shapes without looking whether it could, and then fails to read it."""
    from onnx import shape_inference

    def half(_source, target, *_options, **_more):
        Path(target).write_bytes(b"half of a graph")

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shape_inference, "infer_shapes_path", half)
    monkeypatch.setattr("shutil.disk_usage", lambda _place: usage(10**12, 10**12 - free, free))
    with pytest.raises(OSError if free == 0 else DecodeError) as error:
        quantize_graph(graphs("vit")[0], tmp_path / "int8.onnx", "int8")
    assert (out_of_space(error.value) is None) == (free > 0)
    assert not list(tmp_path.iterdir())


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


def tied_graph(path, table, forms):
    """A table that ids are looked up in and, in each of these forms, x is multiplied by: one output for each."""
    rows, width = table.shape
    ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", "length"])
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", width])
    make, weights = onnx.helper.make_node, {"table": table, "copy": table.T.copy(), "bias": np.arange(rows, dtype="f")}
    nodes = [make("Gather", ["table", "ids"], ["rows"])]
    heads = {
        "transposed": [make("Transpose", ["table"], ["turned"], perm=[1, 0]), make("MatMul", ["x", "turned"], ["0"])],
        "fused": [make("FusedMatMul", ["x", "table"], ["1"], domain="com.microsoft", transB=1, alpha=0.5)],
        "gemm": [make("Gemm", ["x", "table", "bias"], ["2"], transB=1, alpha=2.0)],
        "folded": [make("MatMul", ["x", "copy"], ["3"])],
    }
    nodes += [node for form in forms for node in heads[form]]
    names = ["rows", *(str(list(heads).index(form)) for form in forms)]
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]
    read = {name for node in nodes for name in node.input}
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items() if name in read]
    graph = onnx.helper.make_graph(nodes, "tied", [ids, x], outputs, tensors)
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return names


INTEGER_MODES = [mode for mode in MODES if mode != "float16"]


@pytest.mark.parametrize("mode", INTEGER_MODES)
@pytest.mark.parametrize("width", [256, 96, 50])  # the last fills no block
def test_a_table_and_what_is_tied_to_it_are_one(mode, width, tmp_path):
    """Every way to write a tied output layer reads the very numbers that rows are looked up in, and they are stored
    once."""
    table = np.random.default_rng(0).standard_normal((300, width)).astype(np.float32)
    forms = ["transposed", "fused", "gemm", "folded"]
    names = tied_graph(tmp_path / "model.onnx", table, forms)
    sample = {"ids": np.zeros((1, 1), np.int64), "x": np.eye(width, dtype=np.float32)}
    graph = quantize_graph(tmp_path / "model.onnx", tmp_path / "small.onnx", mode, lambda: iter([sample]))
    ids = np.arange(-300, 300).reshape(2, 300)
    rows, *heads = onnxruntime.InferenceSession(graph).run(names, {"ids": ids, "x": np.eye(width, dtype=np.float32)})
    np.testing.assert_array_equal(rows[0], rows[1])  # negative ids count from the end
    steps = np.abs(table).max(1, keepdims=True) / (8 if mode in ("int4", "int8-tables4") else 128)
    assert (np.abs(rows[1] - table) <= 1.01 * steps).all()
    bias = np.arange(300)
    for form, head in zip(forms, heads, strict=True):
        expected = {"fused": 0.5 * rows[1].T, "gemm": 2 * rows[1].T + bias}.get(form, rows[1].T)
        np.testing.assert_allclose(head, expected, rtol=1e-5, atol=1e-5)
    tensors = onnx.load(graph).graph.initializer
    large = [tensor for tensor in tensors if np.prod(tensor.dims) >= 300 * width / 2]
    assert len(large) == 1


@pytest.mark.parametrize("family", ["gpt2", "llama-tied", "opt", "llama"])
def test_smaller_numbers_make_smaller_files(family, tmp_path):
    """Tied or not, with products of any kind; next to nothing is left in floating point."""
    source = tmp_path / "model.onnx"
    export_onnx(make(family), "text-generation", source)
    feeds = {value.name: feed_of(value) for value in open_session(source).get_inputs()}
    expected = open_session(source).run(["logits"], feeds)[0]
    sizes = {"float32": source.stat().st_size}
    for mode in ("int4", "int8", "int8-blocks", "float16"):
        graph = quantize_graph(source, tmp_path / FILE_NAMES[mode], mode)
        sizes[mode] = graph.stat().st_size
        assert count_quantized(source, graph).share > 0.97
        actual = open_session(graph).run(["logits"], feeds)[0]
        assert np.abs(actual - expected).max() <= ALLOWED[mode] * np.abs(expected).max()
    assert sizes["int4"] < min(sizes["int8"], sizes["int8-blocks"])
    assert max(sizes["int8"], sizes["int8-blocks"]) < sizes["float16"] < sizes["float32"]


@pytest.mark.parametrize("mode", INTEGER_MODES)
def test_ids_beyond_the_table_are_refused(mode, graphs, tmp_path):
    source, feeds = graphs("mistral")
    graph = open_session(quantize_graph(source, tmp_path / "small.onnx", mode, lambda: iter([feeds])))
    vocabulary = read_graph(tmp_path / "small.onnx").vocab_size
    assert vocabulary == read_graph(source).vocab_size
    for ids in (np.full_like(feeds["input_ids"], vocabulary), np.full_like(feeds["input_ids"], -vocabulary - 1)):
        with pytest.raises(Exception, match="indices element out of data bounds"):
            graph.run(["logits"], feeds | {"input_ids": ids})


def test_what_stays_in_floating_point_is_told(tmp_path):
    """By operator and with the reason, from the finished graph."""
    make_node, rng = onnx.helper.make_node, np.random.default_rng(0)
    weights = {
        "kernel": rng.standard_normal((8, 3, 4, 4)), "product": rng.standard_normal((8, 64)),
        "narrow": rng.standard_normal((2, 64)), "left": rng.standard_normal((16, 16)),
        "bias": rng.standard_normal(64),
    }  # fmt: skip
    nodes = [
        make_node("Conv", ["pixels", "kernel"], ["maps"], kernel_shape=[4, 4], strides=[4, 4]),
        make_node("Transpose", ["maps"], ["last"], perm=[0, 2, 3, 1]),
        make_node("MatMul", ["last", "product"], ["wide"]),
        make_node("Add", ["wide", "bias"], ["summed"]),
        make_node("MatMul", ["pairs", "narrow"], ["made"]),
        make_node("MatMul", ["left", "tokens"], ["mixed"]),
    ]
    shapes = {"pixels": [1, 3, 16, 16], "pairs": [1, 2], "tokens": [16, 4]}
    values = {
        name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shapes.get(name))
        for name in (*shapes, "summed", "made", "mixed")
    }
    tensors = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    graph = onnx.helper.make_graph(
        nodes, "g", [values[n] for n in shapes], [values[n] for n in values if n not in shapes], tensors
    )
    source = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), source)
    told = count_quantized(source, quantize_graph(source, tmp_path / "int4.onnx", "int4"))
    assert told.weights == sum(array.size for array in weights.values())
    left = {entry.operator: entry for entry in told.left}
    assert {name: (entry.tensors, entry.weights, entry.bytes) for name, entry in left.items()} == {
        "Conv": (1, 384, 1536), "MatMul": (2, 384, 1536), VECTORS: (1, 64, 256)
    }  # fmt: skip
    assert "convolution" in left["Conv"].reason
    assert told.share == pytest.approx(512 / (384 + 512 + 128 + 256 + 64))


def test_much_in_floating_point_is_a_warning(capfd):
    left = (
        FloatWeights("Conv", tensors=3, weights=150, bytes=600, reason="slow"),
        FloatWeights(VECTORS, tensors=9, weights=5, bytes=20, reason="short"),
    )
    quantization.tell_quantized("dense int8", QuantizedWeights(1000, left))
    told = " ".join("".join(capfd.readouterr()).split())
    assert "84.5% of 1,000 weights quantised" in told
    assert "warning: 15.0% of the weights of dense int8 stay in floating point, in 3 tensors of Conv: slow" in told
    assert VECTORS not in told
    quantization.tell_quantized("dense int8", QuantizedWeights(10_000, left))
    assert "warning" not in "".join(capfd.readouterr())


def test_weights_that_come_out_larger_are_refused(tmp_path):
    weight = np.random.default_rng(0).standard_normal((1, 8)).astype(np.float32)
    one_product(tmp_path / "model.onnx", weight)
    with pytest.raises(InputError, match=r"int8 makes the weights of .* larger"):
        quantize_graph(tmp_path / "model.onnx", tmp_path / "small.onnx", "int8")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert quantize_graph(tmp_path / "model.onnx", tmp_path / "small.onnx", "int8", may_grow=True).is_file()


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
    export_onnx(make("vit", 6), "image-classification", source, GraphForm(external_data_threshold=100))
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
        assert "| weights quantised |" in (output / "report" / "report.md").read_text()
        assert FILE_NAMES[mode] in (output / "artifact" / "README.md").read_text()
    capsys.readouterr()


@pytest.mark.slow
def test_a_text_run_with_blocks(bert_folder, reviews, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "ACTIVATION_SAMPLES", 8)
    output = tmp_path / "run"
    options = ["--task", "text-classification", "--data", reviews, "--calibration-samples", "16", "--threads", "1"]
    assert (
        invoke("quantize", bert_folder, *options, *TEXT, "-o", output, "--quantize", "int4", "--rank-multiple", "2")
        == 0
    )
    rows = json.loads((stage_folder(output, "quantize") / "quantize.json").read_text())["graphs"]
    assert [row["model"] for row in rows] == ["dense", "compressed"]


def test_ranks_fill_their_blocks_unless_told_otherwise():
    def multiple(*modes, own=None):
        config = RunConfig(
            "m", "text-generation", DataConfig("d"), truncate=TruncateConfig(rank_multiple=own), quantize=modes
        )
        return config.cut.multiple

    assert multiple() == multiple("int8", "float16") == 1
    assert multiple("int4") == multiple("int8", "int8-blocks") == BLOCK
    assert multiple("int4", own=8) == 8
    assert multiple("int4", own=1) == 1


@pytest.mark.slow
def test_weights_beside_the_graph_are_published_under_the_name_that_is_looked_for(
    gpt2_folder, prose, tmp_path, monkeypatch, capsys
):
    """With files past their limit: quantised, and refitted where that helped."""
    monkeypatch.setattr(write, "EXTERNAL_DATA_THRESHOLD", 1000)
    output = tmp_path / "run"
    options = ["--task", "text-generation", "--data", prose, "--sequence-length", "24", *QUICK, "--rank-multiple", "2"]
    options += ["--set", "bench.sequence_lengths=8", "--set", "bench.new_tokens=4"]
    assert invoke("quantize", gpt2_folder, *options, "-o", output, "--quantize", "int4") == 0
    captured = capsys.readouterr()
    assert "weights quantised" in captured.out + captured.err
    stage = stage_folder(output, "quantize")
    rows = json.loads((stage / "quantize.json").read_text())["graphs"]
    assert len(rows) == 2
    for row in rows:
        graph = stage / row["model"] / FILE_NAMES[row["mode"]]
        data = graph.with_name(f"{graph.name}_data")
        assert row["bytes"] == graph.stat().st_size + data.stat().st_size
        assert row["weights_quantised"] > 0.9
        assert open_session(graph).get_outputs()[0].name == "logits"
    for side in ("dense", "compressed"):
        name = FILE_NAMES["int4"]
        assert {file.name for file in (stage / side).iterdir()} == {name, f"{name}_data"}
    # What is published can be read by onnx, which takes no weights that have a second name somewhere.
    assert invoke("verify", output) == 0
    for graph in (*sorted((output / "artifact" / "onnx").glob("*.onnx")), output / "baseline" / "onnx" / "model.onnx"):
        assert write.data_file(graph).is_file()
        onnx.load(graph)
    assert invoke("quantize", output, "--quantize", "int8") == 0


def test_an_unknown_mode_is_refused(vit_folder, tmp_path, capsys):
    assert invoke("run", *vit_options(vit_folder), "-o", tmp_path / "run", "--quantize", "int3") == 2
    assert "int8-blocks" in capsys.readouterr().err


def test_products_of_eight_bits_do_not_saturate(tmp_path):
    """On any CPU: the largest weights and activations, 64 of them, against the exact sum."""
    values = [onnx.helper.make_tensor_value_info("a", onnx.TensorProto.UINT8, [1, 64])]
    results = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [1, 64])]
    weight = onnx.numpy_helper.from_array(np.full((64, 64), 127, np.int8), "b")
    node = onnx.helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    graph = onnx.helper.make_graph([node], "g", values, results, [weight])
    path = tmp_path / "product.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    (found,) = open_session(path).run(None, {"a": np.full((1, 64), 255, np.uint8)})
    assert (found == 64 * 255 * 127).all()
