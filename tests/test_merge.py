"""``merge-lora``: the merged artifact has what the artifact had, made as that was made."""

import copy
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import word_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import build, inputs, truncated
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessorPil,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTImageProcessorPil,
)

from converters.errors import InputError
from converters.folder import from_pretrained, save_folder
from converters.onnx.export import export_onnx
from converters.onnx.form import GraphForm
from converters.onnx.modes import FILE_NAMES
from converters.onnx.ort_format import write_ort
from converters.onnx.quantize import quantize_graph
from prehab_export.pipeline.merging import merge_lora

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def lora(model, folder, **options):
    """An adapter with random weights for the dense model."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, init_lora_weights=False, **options)
    get_peft_model(copy.deepcopy(model), config).save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path):
    """A BERT's artifact, whose tokenizer offers no token types, and an adapter."""
    model = build("bert", id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    adapter = lora(model, tmp_path / "lora", target_modules=["query"])
    artifact = tmp_path / "artifact"
    save_folder(truncated(model), artifact, word_tokenizer())
    offered = ["input_ids", "attention_mask"]
    export_onnx(model, "text-classification", artifact / "onnx/model.onnx", GraphForm(text_inputs=offered))
    return artifact, adapter


def shape_and_answer(graph, pixels):
    session = onnxruntime.InferenceSession(str(graph))
    return session.get_inputs()[0].shape[1:], session.run(["logits"], {"pixel_values": pixels.numpy()})[0]


IMAGES = {
    # (class, config, processor, side of the processor's images)
    "convnext": (
        ConvNextForImageClassification,
        ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, image_size=224, num_labels=3),
        ConvNextImageProcessorPil(size={"shortest_edge": 64}),
        64,
    ),
    "dinov2": (
        Dinov2ForImageClassification,
        Dinov2Config(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=70, patch_size=14, num_labels=3
        ),
        ViTImageProcessorPil(size={"height": 28, "width": 28}),
        28,
    ),
}


@pytest.mark.parametrize("family", IMAGES)
def test_images_stay_as_large_as_the_first_export_had_them(family, tmp_path):
    """Not as the config has them: the model takes several sizes, its processor makes one."""
    kind, config, processor, side = IMAGES[family]
    torch.manual_seed(0)
    model = kind._from_config(config).eval()
    adapter = lora(model, tmp_path / "lora", target_modules=["pwconv1" if family == "convnext" else "fc1"])
    artifact = tmp_path / "artifact"
    save_folder(truncated(model), artifact, processor)
    export_onnx(model, "image-classification", artifact / "onnx/model.onnx", GraphForm(image_size=(side, side)))
    merge_lora(artifact, adapter, tmp_path / "merged", threads=1)
    pixels = torch.randn(2, 3, side, side)
    shape, actual = shape_and_answer(tmp_path / "merged/onnx/model.onnx", pixels)
    assert shape == [3, side, side]
    with torch.no_grad():
        expected = from_pretrained(tmp_path / "merged")(pixels).logits.numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_the_other_graphs_are_made_again(bert, tmp_path, capsys):
    artifact, adapter = bert
    graph = artifact / "onnx/model.onnx"
    modes = ["int8", "int4", "float16"]
    for mode in modes:
        quantize_graph(graph, graph.with_name(FILE_NAMES[mode]), mode)
    for name in ("model.onnx", FILE_NAMES["int8"]):
        write_ort(graph.with_name(name), graph.parent)
    graph.with_name(FILE_NAMES["int8-static"]).write_bytes(b"made with data")
    graph.with_name("someone_elses.onnx").write_bytes(b"")
    facts = merge_lora(artifact, adapter, tmp_path / "merged", threads=1)
    left_out = {FILE_NAMES["int8-static"]: "data", "someone_elses.onnx": "does not know"}
    merged = tmp_path / "merged/onnx"
    had = {file.name for file in graph.parent.iterdir()}
    assert {file.name for file in merged.iterdir()} == had - left_out.keys()
    said, card = capsys.readouterr().err, (tmp_path / "merged/README.md").read_text()
    for row in facts["left_out"]:
        assert left_out.pop(row["file"]) in row["reason"]
        assert row["file"] in said
        assert row["file"] in card
    assert not left_out
    with torch.no_grad():
        model = from_pretrained(tmp_path / "merged")
        ids = inputs(model)["input_ids"]
        expected = model(ids).logits.numpy()
        before = from_pretrained(artifact)(ids).logits.numpy()
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
    moved = np.abs(expected - before).max()
    for name in ["model.onnx", *(FILE_NAMES[mode] for mode in modes), "model.ort", "model_int8.ort"]:
        session = onnxruntime.InferenceSession(str(merged / name))
        assert {value.name for value in session.get_inputs()} == set(feeds)
        error = np.abs(session.run(["logits"], feeds)[0] - expected).max()
        assert error < (1e-4 if name in ("model.onnx", "model.ort") else 0.5) * max(moved, np.abs(expected).max()), name


def test_plain_graphs_stay_plain(bert, tmp_path):
    artifact, adapter = bert
    graph = artifact / "onnx/model.onnx"
    export_onnx(from_pretrained(artifact), "text-classification", graph, GraphForm(fuse=False))
    merge_lora(artifact, adapter, tmp_path / "merged", threads=1)
    opsets = [onnx.load(path).opset_import[0].version for path in (graph, tmp_path / "merged/onnx/model.onnx")]
    assert opsets == [20, 20]


def test_nothing_of_others_is_touched(bert, tmp_path):
    artifact, adapter = bert
    for name in ("merged.partial", ".merged.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    (tmp_path / "merged").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    merge_lora(artifact, adapter, tmp_path / "merged", threads=1)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "merged.partial/thesis.txt").read_text() == "years of work"
    assert (tmp_path / "merged").stat().st_mode == artifact.stat().st_mode
    with pytest.raises(InputError, match="not empty"):
        merge_lora(artifact, adapter, tmp_path / "merged")


def test_what_cannot_be_made_again_is_said(bert, tmp_path):
    artifact, adapter = bert
    (artifact / "onnx/model.onnx").rename(artifact / "onnx/renamed.onnx")
    facts = merge_lora(artifact, adapter, tmp_path / "merged", threads=1)
    assert facts["graphs"] == []
    assert [row["file"] for row in facts["left_out"]] == ["renamed.onnx"]


def test_adapters_that_cannot_be_merged_are_refused_before_anything_is_loaded(bert, tmp_path):
    artifact, adapter = bert
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "PREFIX_TUNING"}))
    (artifact / "model.safetensors").unlink()
    with pytest.raises(InputError, match="PREFIX_TUNING cannot be merged"):
        merge_lora(artifact, adapter, tmp_path / "merged")


def test_a_merge_that_fails_leaves_nothing(bert, tmp_path, monkeypatch):
    artifact, adapter = bert
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr("prehab_export.pipeline.merging.export_exact", lambda *_, **__: json.loads("no graph"))
    with pytest.raises(ValueError, match="Expecting value"):
        merge_lora(artifact, adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_tied_model_is_untied_where_the_adapter_tells_the_two_apart(tmp_path):
    model = build("llama-tied")
    adapter = lora(model, tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: value * (1.5 if "lm_head" in name else 1) for name, value in tensors.items()}, path)
    artifact = tmp_path / "artifact"
    save_folder(truncated(model), artifact, word_tokenizer())
    export_onnx(model, "text-generation", artifact / "onnx/model.onnx")
    facts = merge_lora(artifact, adapter, tmp_path / "merged", threads=1)
    assert facts["graphs"] == ["model.onnx"]
    merged = from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(merged.lm_head.weight, 1.5 * merged.model.embed_tokens.weight)
