"""Graphs of models in half precision, and the memory that an export takes."""

import copy
import json
import subprocess
import sys

import onnx
import pytest
import torch
from small_models import build, truncated
from transformers import LlamaConfig, LlamaForCausalLM

from converters.dtypes import cast_weights
from converters.errors import InputError
from converters.folder import from_pretrained, save_folder
from converters.onnx.export import export_onnx
from converters.onnx.form import GraphForm
from prehab_export.deployment.mapped_models import load_mapped
from prehab_export.inputs.widening import has_half_tables

TASKS = {"llama-tied": "text-generation", "bert": "text-classification", "vit": "image-classification"}


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama-tied", torch.bfloat16), ("bert", torch.float16), ("vit", torch.bfloat16)]
)
def test_a_graph_of_halves_is_that_of_the_same_weights_in_float32(family, dtype, tmp_path):
    model = cast_weights(truncated(build(family)), dtype)
    before = copy.deepcopy(model.state_dict())
    export_onnx(model, TASKS[family], tmp_path / "halves" / "model.onnx", GraphForm(widen=True))
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    export_onnx(cast_weights(model, torch.float32), TASKS[family], tmp_path / "float32" / "model.onnx")
    graphs = [(tmp_path / folder / "model.onnx").read_bytes() for folder in ("halves", "float32")]
    assert graphs[0] == graphs[1]


def test_weights_in_a_file_of_their_own_are_those_of_one_file(tmp_path):
    model = cast_weights(truncated(build("llama")), torch.bfloat16)
    for folder, threshold in (("one", None), ("two", 0)):
        form = GraphForm(widen=True, external_data_threshold=threshold)
        export_onnx(model, "text-generation", tmp_path / folder / "model.onnx", form)
    assert (tmp_path / "two" / "model.onnx_data").is_file()
    one, two = (onnx.load(tmp_path / folder / "model.onnx") for folder in ("one", "two"))
    values = [
        {t.name: onnx.numpy_helper.to_array(t).tobytes() for t in graph.graph.initializer} for graph in (one, two)
    ]
    assert values[0] == values[1]
    assert [str(node) for node in one.graph.node] == [str(node) for node in two.graph.node]


def test_latents_cannot_be_found_among_halves(tmp_path):
    model = cast_weights(truncated(build("llama")), torch.bfloat16)
    with pytest.raises(InputError, match="float32"):
        export_onnx(model, "text-generation", tmp_path / "model.onnx", GraphForm(widen=True, kv_cache="latent"))
    assert not list(tmp_path.iterdir())
    assert model.dtype == torch.bfloat16


@torch.no_grad()
def test_a_mapped_folder_computes_what_it_computes_in_float32(tmp_path):
    save_folder(cast_weights(truncated(build("llama-tied")), torch.bfloat16), tmp_path / "model")
    mapped, float32 = load_mapped(tmp_path / "model"), from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert mapped.dtype == torch.bfloat16
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(mapped(input_ids=ids).logits, float32(input_ids=ids).logits)


def test_tables_in_half_precision_are_found():
    model = build("llama").bfloat16()
    assert has_half_tables(model)  # its rotary frequencies were cast, too
    assert not has_half_tables(cast_weights(build("llama"), torch.bfloat16))


# Exports the folder's graph and compares it with the model's own answers, and prints the peak of anonymous memory.
CHILD = """
import json, sys
from pathlib import Path
import torch
from prehab_export.deployment.mapped_models import load_mapped
from prehab_export.deployment.parity import reference_of
from prehab_export.deployment.exporting import export_exact
from prehab_export.inputs.tasks import TASKS
from prehab_export.measurement.memory import resident_kb, sampled_memory
from converters.onnx.form import GraphForm
folder, threshold = Path(sys.argv[1]), int(sys.argv[2])
def export(source, target):
    model = load_mapped(source)
    task = TASKS["text-generation"]
    reference = reference_of(model, task, [{"input_ids": torch.arange(16).reshape(2, 8)}])
    form = GraphForm(widen=True, external_data_threshold=threshold)
    return export_exact(model, task, target / "model.onnx", form, reference, threads=1).bytes
export(folder / "tiny", folder / "tiny-graph")  # loads everything that an export needs
before = resident_kb()["anonymous"]
with sampled_memory() as peaks:
    size = export(folder / "model", folder / "graph")
print(json.dumps({"graph": size, "anonymous": (peaks["anonymous"] - before) * 1024}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_an_export_takes_no_more_memory_than_one_and_a_half_graphs(tmp_path):
    for name, width in (("tiny", 64), ("model", 1024)):
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=16 * width,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        save_folder(LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval(), tmp_path / name)
    own = [sys.executable, "-c", CHILD, str(tmp_path), "0"]
    answer = subprocess.run(own, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    figures = json.loads(answer.splitlines()[-1])
    assert figures["graph"] > 150e6
    assert figures["anonymous"] < 1.5 * figures["graph"] + 60e6
