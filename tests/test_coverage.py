"""Coverage: the share of parameters in layers to compress is counted, reported and refused if it is next to nothing."""

import json
import math

import pytest
import torch
import transformers
from conftest import word_tokenizer
from runs import stage_folder
from test_pipeline import QUICK, TEXT, invoke

from converters.coverage import coverage
from converters.lowrank import dense_weight, low_rank_layers
from converters.selection import select_layers

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT_SIZES = SIZES | {"vocab_size": 64}
GROUPED = TEXT_SIZES | {"num_key_value_heads": 2, "head_dim": 8}
MIXTURES = {
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig(**GROUPED, num_local_experts=8)),
    "qwen3-moe": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig(**GROUPED, num_experts=16, moe_intermediate_size=64),
    ),
    "gpt-oss": (transformers.GptOssForCausalLM, transformers.GptOssConfig(**GROUPED, num_local_experts=16)),
}
WITHOUT_EXPERTS = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig(**TEXT_SIZES)),
    "albert": (
        transformers.AlbertForSequenceClassification,
        transformers.AlbertConfig(**TEXT_SIZES, embedding_size=16),
    ),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**GROUPED)),
    "llama, tied": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32),
    ),
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig(**SIZES, image_size=8, patch_size=2)),
}


def covered(family, **changes):
    model_class, config = (MIXTURES | WITHOUT_EXPERTS)[family]
    model = model_class._from_config(type(config)(**{**config.to_dict(), **changes}))
    return model, coverage(model, select_layers(model))


@pytest.mark.parametrize("family", MIXTURES | WITHOUT_EXPERTS)
def test_every_parameter_is_counted_once(family):
    model, found = covered(family)
    assert found.total == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert found.selected == sum(math.prod(dense_weight(x).shape) for x in select_layers(model).values())
    assert found.selected + sum(group.parameters for group in found.rest) == found.total
    assert found.share + sum(group.share for group in found.rest) == pytest.approx(1)


@pytest.mark.parametrize("family", MIXTURES)
def test_stacked_experts_are_named_as_what_is_not_compressed(family):
    _, found = covered(family)
    assert found.share < 0.1
    assert found.rest[0].name == "model.layers.*.mlp.experts.gate_up_proj"
    assert found.rest[0].kind == "experts"
    assert f"{100 * found.rest[0].share:.1f}% in {found.rest[0].name} (experts)" in found.warning


def test_a_large_embedding_is_a_warning_and_a_small_one_nothing():
    assert covered("llama")[1].warning is None
    _, found = covered("llama, tied", vocab_size=1000)
    assert 0.1 < found.share < 0.5
    assert found.rest[0].name == "model.embed_tokens.weight"
    assert found.rest[0].kind == "embedding"
    assert "model.embed_tokens.weight" in found.warning


def test_what_convolutions_and_other_linears_hold_is_named_as_such():
    sizes = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2, "image_size": 16, "num_labels": 400}
    model = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**sizes))
    kinds = {group.name: group.kind for group in coverage(model, select_layers(model)).rest}
    assert kinds["convnext.encoder.stages.*.layers.*.dwconv.weight"] == "convolution"
    assert kinds["classifier.weight"] == "linear"
    xlnet = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 64}
    model = transformers.XLNetForSequenceClassification(transformers.XLNetConfig(**xlnet))
    kinds = {group.name: group.kind for group in coverage(model, select_layers(model)).rest}
    assert kinds["transformer.layer.*.rel_attn.q"] == "stacked"  # one matrix a head, and no experts
    jetmoe = transformers.JetMoeConfig(
        **TEXT_SIZES | {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4}
    )
    model = transformers.JetMoeForCausalLM(jetmoe)
    kinds = {group.name: group.kind for group in coverage(model, select_layers(model)).rest}
    assert kinds["model.layers.*.mlp.input_linear.weight"] == "experts"  # by their number
    vit, found = covered("vit")
    kinds = {group.name: group.kind for group in found.rest}
    assert kinds["vit.embeddings.position_embeddings"] == "other"  # three dimensions, and no experts
    assert vit.vit.embeddings.position_embeddings.dim() == 3


def test_of_a_compressed_model_the_factors_count(vit_folder):
    from small_models import build, truncated

    model = truncated(build("vit"))
    found = coverage(model, low_rank_layers(model))
    layers = low_rank_layers(model).values()
    assert found.selected == sum(x.up.weight.numel() + x.down.weight.numel() for x in layers)
    assert found.selected + sum(group.parameters for group in found.rest) == found.total


def saved(family, folder, **changes):
    torch.manual_seed(0)
    covered(family, **changes)[0].save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def generation(model, prose, output):
    return [model, "--task", "text-generation", "--data", prose, "-o", output, *QUICK, "--sequence-length", "16"]


@pytest.mark.parametrize("verb", ["run", "truncate", "sweep", "fit"])
def test_next_to_nothing_is_refused_before_any_work(verb, prose, tmp_path, capsys):
    model = saved("mixtral", tmp_path / "mixtral")
    options = generation(model, prose, tmp_path / "run")
    if verb == "fit":
        options += ["--size", "1MB"]
    assert invoke(verb, *options) == 2
    error = capsys.readouterr().err
    share = covered("mixtral")[1].share
    assert f"{100 * share:.1f}% of the model's parameters" in error
    assert "model.layers.*.mlp.experts.gate_up_proj (experts)" in error
    assert "--include" in error
    assert not list((tmp_path / "run").glob("stages/*"))


def test_named_layers_are_compressed_all_the_same(prose, tmp_path, capsys):
    model = saved("mixtral", tmp_path / "mixtral")
    options = generation(model, prose, tmp_path / "run")
    assert invoke("calibrate", *options, "--include", "*.self_attn.*") == 0
    assert "warning: only 5.6%" in capsys.readouterr().err.replace("\n", " ")


def test_below_a_half_is_a_warning_that_the_report_repeats(prose, tmp_path, capsys):
    model = saved("llama, tied", tmp_path / "llama", vocab_size=1000)
    assert invoke("truncate", *generation(model, prose, tmp_path / "run")) == 0
    share = covered("llama, tied", vocab_size=1000)[1].share
    assert f"warning: only {100 * share:.1f}% of the model's parameters" in capsys.readouterr().err
    facts = json.loads((stage_folder(tmp_path / "run", "truncate") / "truncate.json").read_text())
    assert facts["coverage"]["selected_share"] == pytest.approx(share)
    assert facts["coverage"]["rest"][0]["name"] == "model.embed_tokens.weight"
    assert "model.embed_tokens.weight (embedding)" in facts["warnings"][0]


def test_the_share_is_always_said(bert_folder, reviews, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = [bert_folder, "--task", "text-classification", "--data", reviews, "-o", output, *QUICK]
    assert invoke("calibrate", *arguments, *TEXT) == 0
    assert "of the model's parameters are in the layers to compress" in capsys.readouterr().err
    assert invoke("sweep", output, "--method", "svd", "--ratio", "0.5", "--json") == 0
    captured = capsys.readouterr()
    assert "of the model's parameters are in the layers to compress" in captured.err
    coverage_facts = json.loads(captured.out)["coverage"]
    assert invoke("inspect", bert_folder, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["selected_share"] == coverage_facts["selected_share"]
    assert facts["selected_share"] == facts["selected_parameters"] / facts["parameters"]
    assert invoke("inspect", bert_folder) == 0
    assert f"({100 * facts['selected_share']:.1f}%) in layers to compress" in capsys.readouterr().out


def test_inspect_warns_and_does_not_refuse(tmp_path, capsys):
    assert invoke("inspect", saved("mixtral", tmp_path / "mixtral")) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "warning: only 5.6% of the model's parameters" in text
    assert "model.layers.*.mlp.experts.gate_up_proj (experts)" in text
