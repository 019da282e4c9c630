"""Products with one input become one product, and compute what they computed."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_onnx_export import TASKS, make

from converters.onnx import export
from converters.onnx.runtime import open_session
from converters.onnx.stack import stack_products


def weight(graph, name, array):
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def graph_of(widths, biases, generator, tied=False):
    """x → one product a width, each with a bias or without; ``tied``: the first weight is read twice."""
    x = ir.val("x", ir.DataType.FLOAT, ["batch", 3, 4])
    ends = []
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20})
    for index, (width, bias) in enumerate(zip(widths, biases, strict=True)):
        matrix = weight(graph, f"block.{index}.weight", generator.standard_normal((4, width)).astype(np.float32))
        node = ir.node("MatMul", [x, matrix])
        graph.append(node)
        if bias:
            vector = weight(graph, f"block.{index}.bias", generator.standard_normal(width).astype(np.float32))
            # ONNX adds in either order.
            inputs = [node.outputs[0], vector] if index % 2 else [vector, node.outputs[0]]
            node = ir.node("Add", inputs)
            graph.append(node)
        ends.append(node.outputs[0])
    if tied:
        again = ir.node("MatMul", [x, graph.initializers["block.0.weight"]])
        graph.append(again)
        ends.append(again.outputs[0])
    for index, end in enumerate(ends):
        last = ir.node("Neg", [end])
        graph.append(last)
        last.outputs[0].name, last.outputs[0].type = f"y{index}", ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(last.outputs[0])
    return ir.Model(graph, ir_version=10)


def outputs(model, x):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options)
    return session.run(None, {"x": x})


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=4), st.booleans(), st.integers(0, 1000)
)
def test_any_mix_of_widths_and_biases(layers, tied, seed):
    generator = np.random.default_rng(seed)
    widths, biases = zip(*layers, strict=True)
    x = generator.standard_normal((2, 3, 4)).astype(np.float32)
    model = graph_of(widths, biases, generator, tied)
    expected = outputs(model, x)
    # What two nodes read stays where it is, and so does what is not narrower than its 4 inputs.
    free = [bias for width, bias in layers[tied:] if width < 4]
    names = stack_products(model)
    assert bool(names) == (len(free) > 1)
    if len(free) > 1:
        kinds = [node.op_type for node in model.graph]
        assert kinds.count("MatMul") == len(layers) + tied - len(free) + 1
        assert len(names) == (2 if all(free) else 1)
    for got, wanted in zip(outputs(model, x), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "rank", "stacks"),
    [
        ("bert", None, []),
        ("bert", 6, ["query,key,value"]),
        pytest.param("mistral", 6, ["q_proj,k_proj,v_proj", "gate_proj,up_proj"], marks=pytest.mark.slow),
    ],
)
def test_a_stacked_model_computes_what_it_did(family, rank, stacks, tmp_path, monkeypatch):
    model, task = make(family, rank), TASKS.get(family, "text-generation")
    stacked = export.export_onnx(model, task, tmp_path / "stacked.onnx")
    monkeypatch.setattr(export, "stack_products", lambda _model: [])
    plain = export.export_onnx(model, task, tmp_path / "plain.onnx")
    names = [value.name for value in onnx.load(stacked.path).graph.initializer if "{" in value.name]
    assert bool(names) == bool(stacks)
    for stack in stacks:  # one a layer
        assert sum(f"{{{stack}}}" in name and "weight" in name for name in names) == 2
    assert stacked.fusions == plain.fusions
    feeds = {}
    for value in open_session(plain.path).get_inputs():
        shape = [{"batch_size": 2, "past_sequence_length": 3}.get(size, size) for size in value.shape]
        length = 8 if value.name == "attention_mask" and "past_key_values.0.key" in plain.inputs else 5
        shape = [length if isinstance(size, str) else size for size in shape]
        random = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        feeds[value.name] = random if "float" in value.type else np.ones(shape, np.int64)
    got, wanted = (open_session(graph.path).run(["logits"], feeds)[0] for graph in (stacked, plain))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_an_output_of_the_graph_keeps_its_product():
    model = graph_of([3, 2], [False, False], np.random.default_rng(0))
    last = model.graph[-1]
    last.inputs[0].name = "y1"
    model.graph.outputs[1] = last.inputs[0]
    model.graph.remove(last, safe=False)
    assert stack_products(model) == []


def test_nothing_is_copied_before_it_is_written():
    generator = np.random.default_rng(0)
    model = graph_of([3, 2], [False, False], generator)
    (name,) = stack_products(model)
    assert name == "block.{0,1}.weight"
    assert isinstance(model.graph.initializers[name].const_value, ir.LazyTensor)
    assert torch.tensor(model.graph.initializers[name].const_value.numpy()).shape == (4, 5)
