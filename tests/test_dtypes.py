"""The number format of an artifact: the source's or the one asked for, rounded once, the same in folder and graph."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from runs import has_stage, stage_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import FAMILIES, build, logits, truncated
from test_pipeline import QUICK, invoke

from converters.dtypes import cast_weights, loaded_dtypes, main_dtype
from converters.errors import InputError
from converters.folder import from_pretrained, save_folder
from prehab_export.inputs.stored_weights import check_fit_in, weight_files

HALVES = [torch.bfloat16, torch.float16]


def stored_dtypes(folder: Path) -> dict[str, str]:
    """Name → the dtype that the file's own header has."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            found |= {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_weights_come_back_bit_for_bit_and_compute_the_same(family, dtype, tmp_path):
    model = truncated(build(family))
    rounded = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    others = {name: b.clone() for name, b in model.named_buffers() if name not in rounded}
    cast_weights(model, dtype)
    save_folder(model, tmp_path / "model")
    cast_weights(model, torch.float32)
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    again = from_pretrained(tmp_path / "model").state_dict()
    assert again.keys() == rounded.keys()
    assert all(torch.equal(again[name], tensor) and again[name].dtype == dtype for name, tensor in rounded.items())
    assert torch.equal(logits(from_pretrained(tmp_path / "model", dtype=torch.float32)), logits(model))
    # Tables that no folder holds (rotary frequencies) are not rounded along.
    assert all(torch.equal(dict(model.named_buffers())[name], value) for name, value in others.items())


def deepseek():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {
        "intermediate_size": 64,
        "vocab_size": 64,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_group": 1,
    }
    sizes |= {"topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 16}
    sizes |= {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    torch.manual_seed(0)
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes)).eval()


def rwkv():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    return transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes)).eval()


@pytest.mark.parametrize(
    ("make", "dtype", "kept"),
    [
        (deepseek, torch.bfloat16, ("e_score_correction_bias",)),
        (deepseek, torch.float16, ("e_score_correction_bias",)),
        (rwkv, torch.float16, ("time_decay", "time_first")),  # in float32 beside float16 only
        (rwkv, torch.bfloat16, ()),
    ],
)
def test_what_an_architecture_keeps_in_float32_stays_in_it(make, dtype, kept, tmp_path):
    model = make()
    cast_weights(model, dtype)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    save_folder(model, tmp_path / "model")
    again = from_pretrained(tmp_path / "model").state_dict()
    for name, tensor in expected.items():
        due = torch.float32 if name.endswith(kept) and kept else dtype
        assert tensor.dtype == again[name].dtype == due, name
        assert torch.equal(tensor, again[name]), name


def test_the_config_names_the_main_dtype_although_the_first_parameter_has_another(tmp_path):
    model = cast_weights(transformers.GptOssForCausalLM(tiny_gpt_oss()), torch.float16)
    first = next(iter(loaded_dtypes(model, torch.float16)))
    model._keep_in_fp32_modules_strict = {first.removesuffix(".weight")}
    cast_weights(model, torch.float16)
    assert model.dtype == torch.float32
    assert main_dtype(model) == torch.float16
    save_folder(model, tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "float16"


def tiny_gpt_oss():
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return transformers.GptOssConfig(**sizes, intermediate_size=16, vocab_size=64, num_local_experts=2)


def test_a_value_beyond_float16_is_refused_and_the_model_left_as_it_was(tmp_path):
    model = build("bert")
    model.bert.embeddings.LayerNorm.weight.data[0] = 70000.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"LayerNorm\.weight holds 7e\+04, and float16 ends at 6\.55e\+04.*bfloat16"):
        cast_weights(model, torch.float16)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert cast_weights(model, torch.bfloat16).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="LayerNorm"):
        check_fit_in(weight_files(str(tmp_path)), "float16")
    check_fit_in(weight_files(str(tmp_path)), "bfloat16")
    check_fit_in(weight_files(str(tmp_path)), "float32")


def saved_source(folder, family, dtype, **options):
    build(family, dtype).save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_the_dtype_is_that_of_the_files_whatever_the_config_says(dtype, tmp_path):
    saved_source(tmp_path, "llama", getattr(torch, dtype))
    config = json.loads((tmp_path / "config.json").read_text())
    for lie in ("float32", "float16", None):
        (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": lie, "torch_dtype": lie}))
        found = weight_files(str(tmp_path))
        assert found.dtype == dtype
        assert found.kept_dtype == ("float32" if dtype == "float64" else dtype)
    assert found.bytes == (tmp_path / "model.safetensors").stat().st_size


def test_of_several_dtypes_the_one_with_most_bytes_counts(tmp_path):
    saved_source(tmp_path, "llama", torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(mixed, tmp_path / "model.safetensors", {"format": "pt"})
    assert set(stored_dtypes(tmp_path).values()) == {"F32", "BF16"}
    assert weight_files(str(tmp_path)).dtypes == ("bfloat16", "float32")
    assert weight_files(str(tmp_path)).dtype == "bfloat16"


def test_sizes_are_of_the_files_that_are_loaded_and_of_no_others(tmp_path):
    """Shards by their index, through links as the hub's cache has them, and not what lies beside."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    saved_source(blobs, "llama", torch.bfloat16, max_shard_size="20KB")
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    shards = sorted(blobs.glob("model-*.safetensors"))
    assert len(shards) > 1
    (snapshot / "consolidated.safetensors").write_bytes(shards[0].read_bytes())
    found = weight_files(str(snapshot))
    assert [path.name for path in found.files] == [path.name for path in shards]
    assert found.bytes == sum(path.stat().st_size for path in shards)
    assert found.dtype == "bfloat16"
    (snapshot / shards[-1].name).unlink()
    with pytest.raises(InputError, match=f"lacks {shards[-1].name}, which model.safetensors.index.json names"):
        weight_files(str(snapshot))


def test_a_single_file_goes_before_shards_as_in_loading(tmp_path):
    saved_source(tmp_path, "llama", torch.bfloat16, max_shard_size="20KB")
    build("llama").save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single/model.safetensors", tmp_path)
    assert weight_files(str(tmp_path)).dtype == "float32"
    assert [path.name for path in weight_files(str(tmp_path)).files] == ["model.safetensors"]


def test_weights_of_a_hub_model_are_found_in_its_cache(tmp_path, monkeypatch):
    commit = "0" * 40
    snapshot = tmp_path / "models--some--llama/snapshots" / commit
    saved_source(snapshot, "llama", torch.bfloat16, max_shard_size="20KB")
    (tmp_path / "models--some--llama/refs").mkdir()
    (tmp_path / "models--some--llama/refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = weight_files("some/llama")
    assert found.bytes == sum(path.stat().st_size for path in snapshot.glob("*.safetensors"))
    assert found.dtype == "bfloat16"
    with pytest.raises(InputError, match="some/other"):
        weight_files("some/other")


# ---- whole runs


@pytest.fixture(scope="module")
def bf16_llama(llama_folder, tmp_path_factory):
    """A tied LLaMA in bfloat16 with a vocabulary that most of its weights are in, its norms in float32, in two shards,
    and a config that says float32."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "bf16-llama"
    shutil.copytree(llama_folder, folder)
    config = transformers.LlamaConfig.from_pretrained(llama_folder)
    config.vocab_size = 600
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    (first, *_) = sorted(folder.glob("*.safetensors"))
    tensors = load_file(first)
    save_file({n: t.float() if "norm" in n else t for n, t in tensors.items()}, first, {"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(text | {"dtype": "float32"}))
    return folder


def generation(model, prose, output, *more):
    sizes = ["--sequence-length", "24", "--bench-length", "8", "--new-tokens", "4"]
    return [model, "--task", "text-generation", "--data", prose, "-o", output, *QUICK, *sizes, *more]


@pytest.fixture(scope="module")
def bf16_run(bf16_llama, prose, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "bf16"
    assert invoke("run", *generation(bf16_llama, prose, output, "--quantize", "int8")) == 0
    return output


def test_an_artifact_keeps_the_dtype_of_its_source(bf16_llama, bf16_run):
    artifact = bf16_run / "artifact"
    assert set(stored_dtypes(artifact).values()) == {"BF16"}
    assert json.loads((artifact / "config.json").read_text())["dtype"] == "bfloat16"
    assert from_pretrained(artifact).dtype == torch.bfloat16
    # Rounded once: what truncation made, to the nearest.
    held = load_file(stage_folder(bf16_run, "truncate") / "model/model.safetensors")
    # New weights are in float32, all others as they are stored.
    factors = [name for name in held if name.endswith((".up.weight", ".down.weight"))]
    assert factors
    assert {held[name].dtype for name in factors} == {torch.float32}
    assert {held[name].dtype for name in held if "norm" in name or "embed" in name} == {torch.bfloat16}
    written = load_file(artifact / "model.safetensors")
    assert all(torch.equal(written[name], tensor.to(torch.bfloat16)) for name, tensor in held.items())


def test_the_graph_computes_what_the_rounded_weights_compute(bf16_run):
    artifact = bf16_run / "artifact"
    ids = torch.randint(4, 24, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = from_pretrained(artifact, dtype=torch.float32)(input_ids=ids).logits.numpy()
        before = from_pretrained(stage_folder(bf16_run, "truncate") / "model")(input_ids=ids).logits.numpy()
    session = onnxruntime.InferenceSession(str(artifact / "onnx" / "model.onnx"))
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 9), np.int64)}
    for node in session.get_inputs():
        if node.name.startswith("past_key_values"):
            feeds[node.name] = np.zeros((2, node.shape[1], 0, node.shape[3]), np.float32)
        elif node.name == "position_ids":
            feeds[node.name] = np.tile(np.arange(9), (2, 1))
    (actual,) = session.run(["logits"], feeds)
    scale = np.abs(expected).max()
    assert np.abs(actual - expected).max() < 1e-5 * scale
    assert np.abs(before - expected).max() > 1e-4 * scale  # the rounding can be seen


def test_sizes_in_the_report_are_those_of_the_files(bf16_llama, bf16_run, capsys):
    report = json.loads((bf16_run / "report/report.json").read_text())
    source = sum(path.stat().st_size for path in bf16_llama.glob("*.safetensors"))
    artifact = (bf16_run / "artifact/model.safetensors").stat().st_size
    assert report["baseline"]["weight_bytes"] == source
    assert report["export"]["weight_bytes"] == artifact
    assert (report["baseline"]["dtype"], report["export"]["dtype"]) == ("bfloat16", "bfloat16")
    assert report["verify"]["compressed"]["reload"]["dtype"] == "bfloat16"
    assert report["baseline"]["bytes"] == (bf16_run / "baseline/onnx/model.onnx").stat().st_size
    assert report["export"]["bytes"] == (bf16_run / "artifact/onnx/model.onnx").stat().st_size
    for row in report["quantize"]["graphs"]:
        folder = stage_folder(bf16_run, "quantize") / row["model"]
        assert row["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    row = f"| weight files | {source / 1e6:.2f} MB in bfloat16 | {artifact / 1e6:.2f} MB in bfloat16 |"
    assert row in (bf16_run / "report/report.md").read_text()
    assert row in (bf16_run / "artifact/README.md").read_text()
    assert invoke("report", bf16_run) == 0
    assert f"{artifact / 1e6:.2f} bfloat16" in capsys.readouterr().out


def test_the_report_says_which_share_was_selected(bf16_run):
    """Less than half of this model: the embedding is the larger part."""
    report = json.loads((bf16_run / "report/report.json").read_text())
    share = report["truncate"]["coverage"]["selected_share"]
    assert 0.1 < share < 0.5
    markdown = (bf16_run / "report/report.md").read_text()
    assert f"| selected share of the whole model | {100 * share:.1f}% |" in markdown
    assert "model.embed_tokens.weight (embedding)" in markdown.partition("## Warnings")[2]


def test_a_graph_that_is_larger_than_the_source_is_a_warning(bf16_llama, bf16_run):
    """It is in float32, and a source of half the width is not."""
    source = sum(path.stat().st_size for path in bf16_llama.glob("*.safetensors"))
    graph = (bf16_run / "artifact/onnx/model.onnx").stat().st_size
    assert graph > source
    warnings = (bf16_run / "report/report.md").read_text().partition("## Warnings")[2]
    assert f"the graph ({graph / 1e6:.1f} MB of float32) is not smaller than the source's weights" in warnings
    assert "the compressed weights" not in warnings


def test_another_dtype_redoes_the_export_alone_and_warns_where_nothing_is_saved(bf16_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(bf16_run, run)
    kept = ("calibrate", "truncate", "baseline")
    before = [path.stat().st_mtime_ns for name in kept for path in (run / "manifests" / name).iterdir()]
    assert invoke("export", run, "--dtype", "float32") == 0
    assert [path.stat().st_mtime_ns for name in kept for path in (run / "manifests" / name).iterdir()] == before
    error = capsys.readouterr().err
    assert "not smaller than the source's" in error
    assert "--dtype auto keeps the source's number format" in error
    assert set(stored_dtypes(stage_folder(run, "export") / "model").values()) == {"F32"}
    facts = json.loads((stage_folder(run, "export") / "export.json").read_text())
    assert facts["warnings"][0].startswith("the compressed weights")
    assert facts["weight_bytes"] == (stage_folder(run, "export") / "model/model.safetensors").stat().st_size


def test_merging_keeps_the_dtype(bf16_llama, bf16_run, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    dense = transformers.LlamaForCausalLM.from_pretrained(bf16_llama, dtype=torch.bfloat16)
    get_peft_model(dense, config).save_pretrained(tmp_path / "lora")
    assert invoke("merge-lora", bf16_run, tmp_path / "lora", "-o", tmp_path / "merged", "--threads", 1) == 0
    assert set(stored_dtypes(tmp_path / "merged").values()) == {"BF16"}
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    before, after = (load_file(folder / "model.safetensors") for folder in (bf16_run / "artifact", tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("attn" in name for name in changed)
    graph = onnxruntime.InferenceSession(str(tmp_path / "merged/onnx/model.onnx"))
    assert next(node.type for node in graph.get_outputs() if node.name == "logits") == "tensor(float)"


def test_a_fit_that_recommends_the_dense_model_keeps_its_dtype(vit_folder, tmp_path):
    """Where that changes no weight: the graph in the folder was not made of rounded ones."""
    from prehab_export.compression.planning import RankPlan
    from prehab_export.config.data import DataConfig
    from prehab_export.config.run import RunConfig
    from prehab_export.pipeline.fitting.models import FitModels
    from prehab_export.pipeline.session import Session
    from prehab_export.pipeline.workspace import Workspace

    half = tmp_path / "half"
    shutil.copytree(vit_folder, half)
    save_in(half, torch.bfloat16)
    for source, dtype, expected in ((half, "auto", "BF16"), (vit_folder, "bfloat16", "F32"), (half, "float32", "F32")):
        config = RunConfig(str(source), "image-classification", DataConfig("sklearn-digits"), dtype=dtype)
        workspace = Workspace(tmp_path / f"{source.name}-{dtype}")
        for stage in ("calibrate", "baseline"):
            with workspace.publish(stage, stage, {}) as folder:
                (folder / "onnx").mkdir()
                (folder / "onnx" / "model.onnx").write_bytes(b"the dense graph")
            workspace.select(stage, stage)
        models = FitModels(Session(config, workspace))
        nothing_cut = RankPlan({})
        models.write_folder(nothing_cut, "float32", workspace.root / "fit")
        assert set(stored_dtypes(workspace.root / "fit").values()) == {expected}
        given, written = (load_file(folder / "model.safetensors") for folder in (source, workspace.root / "fit"))
        assert all(torch.equal(written[name].double(), tensor.double()) for name, tensor in given.items())


def save_in(folder, dtype):
    """The folder's weights cast, and nothing else of it changed."""
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def test_weights_that_do_not_fit_are_refused_before_any_work(bert_folder, reviews, tmp_path, capsys):
    folder = tmp_path / "bert"
    shutil.copytree(bert_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("LayerNorm.weight"))
    tensors[name][0] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    arguments = [folder, "--task", "text-classification", "--data", reviews, "-o", tmp_path / "run", *QUICK]
    more = ["--input-column", "what was said", "--dtype", "float16"]
    assert invoke("run", *arguments, *more) == 2
    error = capsys.readouterr().err
    assert f"{name} holds 1e+05, and float16 ends at" in error
    assert "--dtype bfloat16" in error
    assert not list((tmp_path / "run").glob("stages/*"))
    assert invoke("run", *arguments, *more[:2], "--dtype", "int8") == 2


def test_weights_that_grew_too_large_on_the_way_end_the_export_alone(vit_folder, tmp_path, capsys):
    """A bias that an adapter brings, beyond float16: nothing is half written, and another dtype goes on from there."""
    from peft import LoraConfig, get_peft_model

    dense = transformers.AutoModelForImageClassification.from_pretrained(vit_folder)
    adapted = get_peft_model(dense, LoraConfig(r=2, target_modules=["fc1"], bias="lora_only"))
    dense.vit.layers[1].mlp.fc1.bias.data[0] = 1e5
    adapted.save_pretrained(tmp_path / "lora")
    output = tmp_path / "run"
    options = ["--task", "image-classification", "--data", "sklearn-digits", *QUICK, "--adapter", tmp_path / "lora"]
    assert invoke("export", vit_folder, *options, "-o", output, "--dtype", "float16") == 2
    error = capsys.readouterr().err
    assert "vit.layers.1.mlp.fc1.up.bias holds 1e+05" in error
    assert "--dtype bfloat16" in error
    assert has_stage(output, "truncate")
    assert not has_stage(output, "export")
    assert not list(output.glob("stages/export/*"))


def test_what_no_artifact_keeps_is_said(vit_folder, tmp_path, capsys):
    """float64 becomes float32."""
    folder = tmp_path / "vit"
    shutil.copytree(vit_folder, folder)
    save_in(folder, torch.float64)
    options = ["--task", "image-classification", "--data", "sklearn-digits", *QUICK]
    assert invoke("calibrate", folder, *options, "-o", tmp_path / "run") == 0
    assert "weights are float64; the artifact's will be float32" in capsys.readouterr().err
