"""A cache of latents against one pass of PyTorch without a cache."""

import json

import numpy as np
import onnx
import pytest
import torch
from test_onnx_export import SLOW, STEPS, TOLERANCE, in_two_parts, make, padded, relative

from converters.errors import InputError
from converters.genai import write_genai_config
from converters.lowrank import low_rank_layers, share_down
from converters.onnx.export import export_onnx
from converters.onnx.form import GraphForm
from converters.onnx.generate import greedy_decode
from converters.onnx.latent import kind_of_cache, rotate
from converters.onnx.modes import MODES
from converters.onnx.quantize import quantize_graph
from converters.onnx.runtime import open_session
from converters.onnx.weights import replace_weights

RANK = 6
# What lies between projection and cache: a rotation; a norm and a rotation; nothing.
LLAMA, QWEN, OPT = "llama-tied", "qwen3", "opt"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """export(family, kind, fuse) → (model, OnnxExport), each done once."""
    done = {}

    def export(family, kind, fuse=True):
        key = (family, kind, fuse)
        if key not in done:
            model, path = make(family, RANK), tmp_path_factory.mktemp("graph") / "model.onnx"
            done[key] = model, export_onnx(model, "text-generation", path, GraphForm(fuse=fuse, kv_cache=kind))
        return done[key]

    return export


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (LLAMA, "latent-values"),
        (LLAMA, "latent"),
        (OPT, "latent"),
        *(
            pytest.param(family, kind, marks=SLOW)
            for family in ("mistral", "qwen2", QWEN, "gemma2")
            for kind in ("latent-values", "latent")
        ),
    ],
)
@pytest.mark.parametrize("fuse", [True, pytest.param(False, marks=SLOW)])
def test_a_cache_of_latents_gives_the_logits_of_pytorch(exported, family, kind, fuse):
    model, export = exported(family, kind, fuse)
    assert kind_of_cache(export.inputs) == kind
    session = open_session(export.path)
    for batch, new, past, padding in STEPS:
        mask = padded(batch, past + new, padding)
        feed = {"input_ids": torch.randint(3, 50, mask.shape), "attention_mask": mask}
        feed["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        feed = {name: value for name, value in feed.items() if name in export.inputs}
        with torch.no_grad():
            expected = model(**feed, use_cache=False).logits[:, past:]
        actual = in_two_parts(session, {name: value.numpy() for name, value in feed.items()}, past)
        assert relative(actual, expected, mask[:, past:].numpy() == 1) < TOLERANCE


@pytest.mark.parametrize("family", [LLAMA, OPT, pytest.param(QWEN, marks=SLOW), pytest.param("gemma2", marks=SLOW)])
def test_the_cache_is_as_narrow_as_the_ranks(exported, family):
    sizes = {}
    for kind in ("full", "latent-values", "latent"):
        model, export = exported(family, kind)
        shapes = {value.name: value.shape for value in open_session(export.path).get_inputs()}
        widths = [shape[1] * shape[3] for name, shape in shapes.items() if name.startswith("past_key_values.")]
        assert export.cache_bytes_per_token == 4 * sum(widths)
        sizes[kind] = sum(widths)
    config = model.config
    angles = 0 if family == OPT else getattr(config, "head_dim", None) or 8
    assert sizes["latent"] == 2 * config.num_hidden_layers * RANK + angles
    assert sizes["full"] > sizes["latent-values"] > sizes["latent"]
    assert sizes["latent-values"] == sizes["full"] // 2 + config.num_hidden_layers * RANK


def test_one_latent_serves_keys_and_values_that_share_it(tmp_path):
    model = make(LLAMA, RANK)
    blocks = [f"model.layers.{index}.self_attn" for index in (0, 1)]
    share_down(model, [[f"{block}.{part}_proj" for part in "qkv"] for block in blocks])
    export = export_onnx(model, "text-generation", tmp_path / "model.onnx", GraphForm(kv_cache="latent"))
    past = [name for name in export.inputs if name.startswith("past_key_values.")]
    assert past == ["past_key_values.0.latent", "past_key_values.1.latent", "past_key_values.angles"]
    tokens = torch.tensor([[5, 9, 23], [7, 41, 8]])
    actual = greedy_decode(open_session(export.path), tokens.numpy(), 6)
    np.testing.assert_array_equal(actual, greedy(model, tokens, 6))


def greedy(model, tokens, count):
    for _ in range(count):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens.numpy()


def test_what_cannot_be_kept_as_latents_is_kept_as_it_is(tmp_path):
    """GPT-2 and GPT-NeoX make queries, keys and values in one layer; dense layers have no latents."""
    for model in (make("gpt2", RANK), make("gpt-neox", RANK), make(LLAMA)):
        export = export_onnx(model, "text-generation", tmp_path / "model.onnx", GraphForm(kv_cache="latent"))
        assert kind_of_cache(export.inputs) == "full"
        assert any("cached as they are" in warning for warning in export.warnings)
        tokens = torch.tensor([[5, 9, 23]])
        actual = greedy_decode(open_session(export.path), tokens.numpy(), 4)
        np.testing.assert_array_equal(actual, greedy(model, tokens, 4))


def test_a_latent_wider_than_its_keys_is_not_taken(tmp_path):
    model = make(LLAMA, 20)  # keys and values are 16 wide
    export = export_onnx(model, "text-generation", tmp_path / "model.onnx", GraphForm(kv_cache="latent"))
    assert kind_of_cache(export.inputs) == "full"
    assert "no narrower than the keys" in export.warnings[0]


def test_an_unknown_cache_is_refused(tmp_path):
    with pytest.raises(InputError, match="latent-values"):
        export_onnx(make(LLAMA), "text-generation", tmp_path / "model.onnx", GraphForm(kv_cache="small"))


def test_the_model_is_handed_back_as_it_was(tmp_path):
    model, twin = make(LLAMA, RANK), make(LLAMA, RANK)
    export_onnx(model, "text-generation", tmp_path / "model.onnx", GraphForm(kv_cache="latent"))
    assert model.config._attn_implementation == twin.config._attn_implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in twin.named_modules()
    }


def test_rotation_is_that_of_the_models():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    angles = torch.randn(2, 5, 4)
    both = torch.cat([angles, angles], dim=-1)
    expected = apply_rotary_pos_emb(query, key, both.cos(), both.sin())[1]
    table = torch.cat([angles.cos(), angles.sin()], dim=-1).unsqueeze(1)
    torch.testing.assert_close(rotate(key, table), expected)
    wider = torch.cat([key, torch.randn(2, 2, 5, 3)], dim=-1)  # what is not rotated passes through
    torch.testing.assert_close(rotate(wider, table), torch.cat([expected, wider[..., 8:]], dim=-1))


def test_weights_by_head_keep_their_names_and_can_be_replaced(exported, tmp_path):
    model, export = exported(LLAMA, "latent")
    stored = {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(export.path).graph.initializer}
    name = "model.layers.1.self_attn.v_proj.up.weight"
    weight = model.get_parameter(name).detach().numpy()
    np.testing.assert_array_equal(stored[f"{name}.heads.T"], weight.reshape(2, 8, RANK).transpose(0, 2, 1))
    layers = low_rank_layers(model)
    changed = {f"{layer}.up.weight": 2 * layers[layer].up.weight.detach() for layer in layers if "v_proj" in layer}
    replace_weights(export.path, tmp_path / "changed.onnx", changed)
    with torch.no_grad():
        for parameter, value in changed.items():
            model.get_parameter(parameter).copy_(value)
    ids = torch.randint(3, 50, (2, 5))
    feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(5).expand(2, -1)}
    actual = in_two_parts(open_session(tmp_path / "changed.onnx"), {k: v.numpy() for k, v in feed.items()}, 3)
    with torch.no_grad():
        assert relative(actual, model(ids).logits[:, 3:]) < TOLERANCE
        for parameter in changed:
            model.get_parameter(parameter).div_(2)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "int8-static"])
def test_graphs_over_latents_are_quantised_head_by_head_too(exported, tmp_path, mode):
    ids = np.random.default_rng(0).integers(3, 50, (2, 6))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(6)[None].repeat(2, 0)}
    errors = {}
    for kind in ("full", "latent"):
        _, export = exported(LLAMA, kind)
        target = quantize_graph(export.path, tmp_path / kind / "small.onnx", mode)
        expected = torch.from_numpy(in_two_parts(open_session(export.path), feed, 4))
        errors[kind] = relative(in_two_parts(open_session(target), feed, 4), expected)
    assert errors["latent"] < 1.5 * errors["full"]
    graph = onnx.load(target).graph
    left = {value.name for value in graph.initializer if value.data_type == onnx.TensorProto.FLOAT}
    if mode != "float16":
        assert not any(name.endswith(".weight.heads.T") for name in left)
        assert any(node.op_type == "MatMulInteger" for node in graph.node)


def test_onnxruntime_genai_is_given_no_config_it_could_not_use(exported, tmp_path):
    for kind, written in (("full", True), ("latent", False)):
        model, export = exported(LLAMA, kind)
        assert write_genai_config(model, tmp_path, export.path, export.inputs) is written
    assert json.loads((tmp_path / "genai_config.json").read_text())["model"]["type"] == "decoder"
