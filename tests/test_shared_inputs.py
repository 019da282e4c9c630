"""One ``down`` between layers that read the same input: in the model, in its folder, in its graph."""

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_models import build, inputs, linears, logits, truncated
from transformers import AutoModel, AutoModelForCausalLM

from converters.adapters import merge_dense_adapter, merge_into_factors
from converters.errors import InputError
from converters.folder import from_pretrained, register_auto_model, save_folder
from converters.lowrank import (
    Factors,
    dense_weight,
    densify,
    factorize,
    factorize_empty,
    factors_of,
    low_rank_layers,
    share_down,
    shared_groups,
)
from converters.onnx.export import export_onnx
from converters.onnx.form import GraphForm
from converters.onnx.generate import empty_cache, step_inputs
from converters.onnx.runtime import open_session
from prehab_export.pipeline.inspection import inspect_model

GROUPS = {
    "bert": [("query", "key", "value")],
    "vit": [("q_proj", "k_proj", "v_proj")],
    "llama": [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")],
}
RANK = 7


def groups_of(model, kinds):
    """Layers of one block with one of the kinds' names each, group by group."""
    names = list(linears(model))
    blocks = dict.fromkeys(name.rpartition(".")[0] for name in names)
    found = [tuple(f"{block}.{leaf}" for leaf in kind) for block in blocks for kind in kinds]
    return [group for group in found if set(group) <= set(names)]


@torch.no_grad()
def joint_factors(model, group, rank=RANK):
    """The truncated SVD of the stacked weights, cut back into the layers."""
    layers = [model.get_submodule(name) for name in group]
    stacked = torch.cat([dense_weight(layer) for layer in layers])
    u, s, vt = torch.linalg.svd(stacked.double(), full_matrices=False)
    ups = (u[:, :rank] * s[:rank]).to(stacked.dtype).split([dense_weight(layer).shape[0] for layer in layers])
    down = vt[:rank].to(stacked.dtype)
    biases = [None if layer.bias is None else layer.bias.detach().clone() for layer in layers]
    return {name: Factors(up, down, bias) for name, up, bias in zip(group, ups, biases, strict=True)}


def shared_model(family, dtype=torch.float32, rank=RANK, others=True):
    """Groups with one ``down``, the other linears truncated too or left dense."""
    model = build(family, dtype)
    groups = groups_of(model, GROUPS[family])
    factors = {name: pair for group in groups for name, pair in joint_factors(model, group, rank).items()}
    factorize(model, factors)
    if others:
        truncated(model, keep=lambda name: name not in factors and not name.endswith((".up", ".down")))
    assert shared_groups(model) == groups
    assert len(groups) == 2 * len(GROUPS[family])
    return model


def assert_tied(model, groups):
    assert shared_groups(model) == groups
    for first, *others in groups:
        for name in others:
            assert model.get_submodule(name).down is model.get_submodule(first).down


@pytest.mark.parametrize("family", GROUPS)
def test_one_down_holds_for_the_group(family):
    model = shared_model(family, others=False)
    groups = shared_groups(model)
    assert_tied(model, groups)
    assert_tied(copy.deepcopy(model), groups)
    dense = sum(p.numel() for p in build(family).parameters())
    saved = 0
    for group in groups:
        shapes = [(layer.out_features, layer.in_features) for layer in map(model.get_submodule, group)]
        saved += sum(m * n for m, n in shapes) - RANK * (shapes[0][1] + sum(m for m, _ in shapes))
    assert sum(p.numel() for p in model.parameters()) == dense - saved


@pytest.mark.parametrize("family", GROUPS)
def test_full_rank_computes_the_dense_model_and_densify_goes_back(family):
    want = logits(build(family))
    model = shared_model(family, rank=32, others=False)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    densify(model)
    assert not low_rank_layers(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)


def test_factors_carry_the_tie_from_model_to_model():
    model = shared_model("llama")
    other = factorize(build("llama", seed=1), factors_of(model))
    assert_tied(other, shared_groups(model))
    for name, pair in factors_of(other).items():
        assert torch.equal(pair.down, model.get_submodule(name).down.weight)


def test_gradients_of_the_members_add_up():
    model = shared_model("bert")
    apart = with_own_downs(model)
    for each in (model, apart):
        each(**inputs(each)).logits.sum().backward()
    for first, *others in shared_groups(model):
        parts = [apart.get_submodule(name).down.weight.grad for name in (first, *others)]
        torch.testing.assert_close(model.get_submodule(first).down.weight.grad, sum(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", GROUPS)
def test_round_trip_keeps_weights_and_tie(family, dtype, tmp_path):
    model = shared_model(family, dtype)
    groups = shared_groups(model)
    save_folder(model, tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model")
    assert_tied(loaded, groups)
    assert torch.equal(logits(loaded), logits(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for first, *others in groups if family != "vit" else ():  # transformers writes a ViT under its older names
        assert f"{first}.down.weight" in stored
        assert not any(f"{name}.down.weight" in stored for name in others)
    assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in model.parameters())
    entry = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert sorted(map(tuple, entry["shared"])) == sorted(groups)


def test_saving_again_writes_the_same(tmp_path):
    save_folder(shared_model("llama"), tmp_path / "first")
    loaded = from_pretrained(tmp_path / "first")
    save_folder(loaded, tmp_path / "second")
    loaded.save_pretrained(tmp_path / "third")
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
    assert_tied(from_pretrained(tmp_path / "third"), shared_groups(loaded))


def test_a_tie_that_is_gone_is_not_written(tmp_path):
    save_folder(shared_model("llama"), tmp_path / "first")
    loaded = from_pretrained(tmp_path / "first")
    densify(loaded)
    truncated(loaded)
    loaded.save_pretrained(tmp_path / "again")
    again = from_pretrained(tmp_path / "again")
    assert shared_groups(again) == []
    assert torch.equal(logits(again), logits(loaded))


def test_shards(tmp_path):
    model = shared_model("llama")
    save_folder(model, tmp_path / "model", max_shard_size="10KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    loaded = from_pretrained(tmp_path / "model")
    assert_tied(loaded, shared_groups(model))
    assert torch.equal(logits(loaded), logits(model))


def test_auto_model_with_and_without_the_head(tmp_path):
    model = shared_model("llama")
    save_folder(model, tmp_path / "model")
    register_auto_model()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_tied(whole, shared_groups(model))
    assert torch.equal(logits(whole), logits(model))
    bare = AutoModel.from_pretrained(tmp_path / "model")
    assert_tied(bare, [tuple(name.removeprefix("model.") for name in group) for group in shared_groups(model)])
    save_folder(bare, tmp_path / "bare")
    headed = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    assert_tied(headed, shared_groups(model))
    assert torch.equal(headed.model.layers[0].mlp.gate_proj.weight, model.model.layers[0].mlp.gate_proj.weight)


def test_inspection_counts_a_shared_down_once(tmp_path):
    model = shared_model("llama")
    save_folder(model, tmp_path / "model")
    facts = inspect_model(str(tmp_path / "model"))
    factors = {id(p): p.numel() for layer in low_rank_layers(model).values() for p in layer.parameters()}
    assert facts["selected_parameters"] == sum(factors.values())
    down_of = {row["name"]: row["down_of"] for row in facts["layers"] if row["rank"]}
    assert down_of == dict.fromkeys(low_rank_layers(model)) | {
        name: first for first, *others in shared_groups(model) for name in others
    }


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ([["a", "b"], ["b", "c"]], "two groups"),
        ([["a", "nowhere"]], "not one rank"),
        ([["a", "d"]], "not one rank"),
    ],
)
def test_a_malformed_entry_is_refused(shared, message, tmp_path):
    save_folder(shared_model("bert"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"ranks": {"a": 2, "b": 2, "c": 2, "d": 3}, "shared": shared}
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        from_pretrained(tmp_path / "model")


def test_what_cannot_be_shared_is_named():
    model = build("bert")
    names = [f"bert.encoder.layer.0.{leaf}" for leaf in ("attention.self.query", "output.dense")]
    with pytest.raises(InputError, match=r"output\.dense cannot share the down factor"):
        factorize_empty(copy.deepcopy(model), dict.fromkeys(names, 3), [names])
    with pytest.raises(InputError, match="not a two-factor linear"):
        share_down(model, [names])


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_graph_multiplies_by_down_once_a_group(family, fuse, tmp_path):
    model = shared_model(family)
    task = "text-generation" if family == "llama" else "text-classification"
    export = export_onnx(model, task, tmp_path / "model.onnx", GraphForm(fuse=fuse))
    graph = onnx.load(export.path).graph
    stored = {value.name for value in graph.initializer}
    products = [
        name for node in graph.node if "MatMul" in node.op_type or node.op_type == "Gemm" for name in node.input
    ]
    for first, *others in shared_groups(model):
        assert products.count(f"{first}.down.weight.T") == 1
        assert not stored & {f"{name}.down.weight.T" for name in others}
        assert all(products.count(f"{name}.up.weight.T") == 1 for name in (first, *others))
    downs = [name for name in stored if ".down.weight" in name]
    factored = low_rank_layers(model)
    # A stack has as many parts as it has names in its braces.
    assert sum(name.count(",") + 1 for name in downs) == len({id(layer.down) for layer in factored.values()})
    ids = inputs(model)["input_ids"]
    session = open_session(export.path)
    if family == "llama":
        feed = step_inputs(session, ids.numpy(), ids.shape[1]) | empty_cache(session, len(ids))
    else:
        feed = {name: np.ones_like(ids.numpy()) for name in export.inputs} | {"input_ids": ids.numpy()}
        feed |= {"token_type_ids": np.zeros_like(ids.numpy())}
    want = logits(model).numpy()
    assert np.abs(session.run(["logits"], feed)[0] - want).max() < 5e-6 * np.abs(want).max()


def train(model, folder, **options):
    """An adapter with random weights on a copy of the model, saved; returns the logits that PEFT computes."""
    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=3, lora_alpha=5, **options)).eval()
    shake(adapted)
    adapted.save_pretrained(folder)
    want = logits(adapted)
    assert (want - logits(model)).abs().max() > 1e-3
    return want


@torch.no_grad()
def shake(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", GROUPS)
def test_adapters_of_the_up_factors_merge_exactly(family, tmp_path):
    model = shared_model(family)
    groups = shared_groups(model)
    want = train(model, tmp_path / "adapter", target_modules=["up"])
    report = merge_into_factors(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert all(layer.exact for layer in report.layers.values())
    assert_tied(model, groups)
    save_folder(model, tmp_path / "merged")
    assert torch.equal(logits(from_pretrained(tmp_path / "merged")), logits(model))


@pytest.mark.parametrize("family", GROUPS)
def test_one_adapter_of_a_shared_down_trains_and_merges_for_all(family):
    model = shared_model(family)
    groups, before = shared_groups(model), logits(model)
    targets = [f"{name}.down" for name in low_rank_layers(model)]
    wrapped = get_peft_model(model, LoraConfig(r=3, target_modules=targets)).eval()
    share_down(model, groups)
    shake(wrapped)
    want = logits(wrapped)
    assert (want - before).abs().max() > 1e-3
    wrapped.merge_and_unload()
    share_down(model, groups)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert_tied(model, groups)
    assert not any("lora" in name for name, _ in model.named_modules(remove_duplicate=False))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "options", [{"target_modules": ["down"]}, {"target_modules": ["up"], "modules_to_save": ["down"]}]
)
def test_an_adapter_of_a_shared_down_is_refused(options, tmp_path):
    model = shared_model("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for trained_on in (model, with_own_downs(model)):
        train(trained_on, tmp_path, **options)
        for merge in (merge_into_factors, merge_dense_adapter):
            with pytest.raises(InputError, match="share one down"):
                merge(model, tmp_path)
    assert_tied(model, shared_groups(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def with_own_downs(model):
    """The same factors in a model that shares none of them."""
    apart = densify(copy.deepcopy(model))
    return factorize(apart, {n: Factors(p.up, p.down.clone(), p.bias) for n, p in factors_of(model).items()})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("family", "targets"), [("bert", ["query", "value"]), ("llama", ["k_proj", "gate_proj"])])
def test_a_dense_adapter_is_cut_back_to_the_best_joint_rank(family, targets, tmp_path):
    dense = build(family)
    train(dense, tmp_path, target_modules=targets)
    model = shared_model(family)
    groups = shared_groups(model)
    full = merge_dense_adapter(densify(copy.deepcopy(model)), tmp_path)
    generator = torch.Generator().manual_seed(3)
    metrics = {}
    for group in groups:
        C = moment(32, generator)
        metrics |= {name: (C, moment(model.get_submodule(name).out_features, generator)) for name in group}
    report = merge_into_factors(model, tmp_path, lambda name: metrics.get(name, (None, None)))
    assert_tied(model, groups)
    assert {name for group in groups for name in group} & set(report.layers)
    for group in groups:
        touched = any(name.endswith(tuple(targets)) for name in group)
        assert (set(group) <= set(report.layers)) == touched
        left = [torch.linalg.cholesky(metrics[name][1]).T for name in group]
        right = torch.linalg.cholesky(metrics[group[0]][0])
        wanted = [dense_weight(full.get_submodule(name)).detach().double() for name in group]
        whitened = [root @ weight @ right for root, weight in zip(left, wanted, strict=True)]
        sigma = torch.linalg.svdvals(torch.cat(whitened))
        got = [root @ model.get_submodule(name).weight.double() @ right for root, name in zip(left, group, strict=True)]
        errors = [(a - b).norm() for a, b in zip(whitened, got, strict=True)]
        least = sigma[RANK:].norm().item()
        assert torch.stack(errors).norm().item() == pytest.approx(least, rel=1e-3, abs=1e-4 * sigma.norm().item())
        for name, error, whole in zip(group, errors, whitened, strict=True):
            if touched:
                assert report.layers[name].error == pytest.approx((error / whole.norm()).item(), rel=1e-3, abs=1e-5)


def moment(size, generator):
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.T


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_dense_adapter_loses_nothing_where_the_joint_rank_suffices(tmp_path):
    want = train(build("bert"), tmp_path, target_modules=["query", "value"], lora_bias=True)
    model = shared_model("bert", rank=32, others=False)
    report = merge_into_factors(model, tmp_path)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    assert all(layer.exact for layer in report.layers.values())
