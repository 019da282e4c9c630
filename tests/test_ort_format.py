"""ONNX Runtime's own format: equal answers, complete lists of operators, the verdict, and a run that makes them."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from runs import has_stage
from small_models import build, truncated
from test_pipeline import invoke
from test_quantize import vit_options

from converters.errors import InputError
from converters.onnx import ort_format
from converters.onnx.export import export_onnx
from converters.onnx.ort_format import mobile_verdict, write_ort
from converters.onnx.quantize import quantize_graph
from prehab_export.pipeline.stages import ort as ort_files

TASKS = {"vit": "image-classification", "bert": "text-classification", "llama": "text-generation"}


def feeds_of(session):
    rng = np.random.default_rng(0)

    def values(entry):
        free = {"batch_size": 2, "past_sequence_length": 0}
        shape = [size if isinstance(size, int) else free.get(size, 5) for size in entry.shape]
        whole = "int64" in entry.type
        return np.ones(shape, np.int64) if whole else rng.standard_normal(shape).astype(np.float32)

    return {entry.name: values(entry) for entry in session.get_inputs()}


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize("family", list(TASKS))
def test_an_ort_file_answers_as_its_graph(family, mode, tmp_path):
    graph = export_onnx(truncated(build(family), 6), TASKS[family], tmp_path / "model.onnx").path
    if mode is not None:
        graph = quantize_graph(graph, tmp_path / f"model_{mode}.onnx", mode)
    files = write_ort(graph, tmp_path / "out")
    assert files.model.name == f"{graph.stem}.ort"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {files.model.name, files.operators.name}
    ours, theirs = onnxruntime.InferenceSession(graph), onnxruntime.InferenceSession(files.model)
    feeds = feeds_of(ours)
    for expected, found in zip(ours.run(None, feeds), theirs.run(None, feeds), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1e-3, np.abs(expected).max(initial=0)))
    listed = files.operators.read_text()
    assert str(tmp_path) not in listed
    assert "LayerNormalization" in listed or "SimplifiedLayerNormalization" in listed or "RMSNormalization" in listed
    assert "ScaledDotProductAttention" not in listed, "functions are inlined"


def test_the_verdict_names_what_an_accelerator_lacks(tmp_path):
    graph = export_onnx(build("vit"), "image-classification", tmp_path / "model.onnx").path
    verdict = mobile_verdict(graph)
    assert any("Attention" in line and "Unsupported" in line for line in verdict.said)
    assert not any(str(tmp_path) in line for line in verdict.said)
    plain = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        *[[onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4])] for name in "xy"],
    )
    opset = [onnx.helper.make_opsetid("", 13)]
    onnx.save(onnx.helper.make_model(plain, opset_imports=opset, ir_version=9), tmp_path / "relu.onnx")
    assert mobile_verdict(tmp_path / "relu.onnx").suits_an_accelerator != verdict.suits_an_accelerator


def test_what_the_format_cannot_hold(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no ONNX graph"):
        write_ort(tmp_path / "none.onnx", tmp_path / "out")
    graph = export_onnx(build("vit"), "image-classification", tmp_path / "model.onnx").path
    monkeypatch.setattr(ort_format, "LARGEST_BYTES", 1000)
    with pytest.raises(InputError, match="ends at 2 GB"):
        write_ort(graph, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_with_ort_files(vit_folder, tmp_path, capsys):
    output = tmp_path / "run"
    options = [*vit_options(vit_folder), "-o", output, "--quantize", "int8", "--ort"]
    assert invoke("run", *options) == 0
    report = json.loads((output / "report" / "report.json").read_text())
    assert [row["graph"] for row in report["ort"]["files"]] == ["compressed", "compressed int8"]
    for row in report["ort"]["files"]:
        file = output / "artifact" / "onnx" / row["file"]
        assert file.stat().st_size == row["bytes"]
        assert row["max_relative"] <= 1e-4
        assert file.with_suffix(".required_operators_and_types.config").is_file()
        assert row["file"] in (output / "artifact" / "README.md").read_text()
    assert "For minimal builds" in (output / "report" / "report.md").read_text()
    assert invoke("run", output, "--no-ort") == 0
    assert not list((output / "artifact" / "onnx").glob("*.ort"))
    capsys.readouterr()


@pytest.mark.slow
def test_an_ort_file_that_answers_otherwise_is_not_published(vit_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ort_files, "TOLERANCE", -1.0)
    output = tmp_path / "run"
    assert invoke("export", *vit_options(vit_folder), "-o", output, "--ort") == 3
    assert "model.ort differs by" in capsys.readouterr().err
    assert not has_stage(output, "ort")
