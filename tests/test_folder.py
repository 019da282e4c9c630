import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import FAMILIES, TEXT, build, linears, logits, truncated
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
)

from converters import folder, registration
from converters.errors import InputError
from converters.folder import from_pretrained, register_auto_model, save_folder
from converters.lowrank import Factors, LowRankLinear, densify, factorize, low_rank_layers

SHARED = Path(__file__).resolve().parents[2] / "shared"


def assert_same(model, other):
    """Every parameter and buffer, bit for bit, and what is tied to what."""
    assert type(model) is type(other)
    for ours, theirs in (
        (dict(model.state_dict()), dict(other.state_dict())),
        (dict(model.named_buffers()), dict(other.named_buffers())),
    ):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name
    assert dict(model.named_parameters()).keys() == dict(other.named_parameters()).keys()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **changes}))


@pytest.fixture
def saved(tmp_path):
    model = truncated(build("bert"), keep=lambda name: "layer.0" in name)
    save_folder(model, tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(family, tmp_path):
    model = truncated(build(family), keep=lambda name: not name.endswith("key"))
    save_folder(model, tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model")
    assert_same(model, loaded)
    assert torch.equal(logits(model), logits(loaded))
    assert not loaded.training


def test_who_may_read_the_config_may_read_the_weights(tmp_path):
    save_folder(truncated(build("bert"), 4), tmp_path / "out", max_shard_size="20KB")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) > 3
    assert len(set(modes.values())) == 1


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(tmp_path):
    (tmp_path / f".model.partial-{os.getpid()}").mkdir()
    save_folder(build("vit"), tmp_path / "model")
    from_pretrained(tmp_path / "model")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["vit", "qwen2", "gpt2"])
def test_round_trip_in_half_precision(family, dtype, tmp_path):
    model = truncated(build(family, dtype))
    save_folder(model, tmp_path / "model")
    assert_same(model, from_pretrained(tmp_path / "model"))


@pytest.mark.parametrize("family", ["bert-mlm", "llama-tied", "gpt2"])
def test_factored_head_is_no_longer_tied(family, tmp_path):
    model = truncated(build(family), head=True)
    assert isinstance(model.get_output_embeddings(), LowRankLinear)
    save_folder(model, tmp_path / "model")
    assert_same(model, from_pretrained(tmp_path / "model"))
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["vit", "llama-tied", "gpt2"])
def test_resaving_is_exact(family, tmp_path):
    model = truncated(build(family))
    save_folder(model, tmp_path / "first")
    loaded = from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "again")
    assert_same(model, from_pretrained(tmp_path / "again"))
    save_folder(loaded, tmp_path / "third")
    assert contents(tmp_path / "third") == contents(tmp_path / "first")


def test_resaving_after_a_change_of_ranks(saved, tmp_path):
    loaded = from_pretrained(saved[1])
    densify(loaded)
    truncated(loaded, rank=3, keep=lambda name: "layer.1" in name)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(loaded, from_pretrained(tmp_path / "again"))


def test_what_is_written(saved):
    model, folder = saved
    ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    entry = config_of(folder)["quantization_config"]
    assert entry == {"quant_method": "prehab_lowrank", "format_version": 1, "ranks": ranks, "shared": []}
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        names = set(tensors.keys())
    assert names == set(model.state_dict())
    query = "bert.encoder.layer.0.attention.self.query"
    assert {f"{query}.down.weight", f"{query}.up.weight", f"{query}.up.bias"} <= names
    assert AutoConfig.from_pretrained(folder).model_type == "bert"


def test_tied_weights_are_stored_once(tmp_path):
    model = truncated(build("llama-tied"))
    save_folder(model, tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    loaded = from_pretrained(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


class SharedMLP(BertForSequenceClassification):
    """An architecture in which all blocks hold one intermediate layer."""

    def __init__(self, config):
        super().__init__(config)
        blocks = self.bert.encoder.layer
        for block in blocks[1:]:
            block.intermediate = blocks[0].intermediate


@pytest.mark.parametrize("factored", [False, True])
def test_a_layer_with_several_names_is_stored_once_and_loads_under_each(factored, tmp_path, monkeypatch):
    monkeypatch.setattr(folder.transformers, "SharedMLP", SharedMLP, raising=False)
    torch.manual_seed(0)
    model = SharedMLP(build("bert").config).eval()
    if factored:
        truncated(model)
    save_folder(model, tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert not any("layer.1.intermediate" in name for name in stored)
    again = from_pretrained(tmp_path / "m")
    assert torch.equal(logits(again), logits(model))
    assert again.bert.encoder.layer[1].intermediate is again.bert.encoder.layer[0].intermediate
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    save_folder(again, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "m" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("factored", [False, True])
def test_one_layer_in_two_places_of_the_architecture_is_refused(factored, tmp_path):
    model = build("bert")
    model.bert.encoder.layer[1].intermediate.dense = model.bert.encoder.layer[0].intermediate.dense
    if factored:
        truncated(model)
    with pytest.raises(
        InputError, match=r"layer\.0\.intermediate\.dense and bert\.encoder\.layer\.1\.inter.* are one module"
    ):
        save_folder(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_shards(tmp_path):
    model = truncated(build("llama"))
    save_folder(model, tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    assert_same(model, from_pretrained(tmp_path / "model"))


def test_the_model_is_left_as_it_was(tmp_path):
    model = truncated(build("gpt2"))
    before, weights = model.config.to_dict(), {name: p.clone() for name, p in model.named_parameters()}
    save_folder(model, tmp_path / "model")
    assert model.config.to_dict() == before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_bytes_depend_on_the_model_only(tmp_path):
    for place in ("a", "somewhere/else"):
        save_folder(truncated(build("vit")), tmp_path / place)
    assert contents(tmp_path / "a") == contents(tmp_path / "somewhere/else")


def test_no_path_of_this_machine_is_written(tmp_path):
    sizes = {key: TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 50},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(tmp_path / "dense")
    model = truncated(CLIPModel.from_pretrained(tmp_path / "dense"))
    model.config.text_config._name_or_path = str(tmp_path)
    save_folder(model, tmp_path / "model")
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    assert_same(model, from_pretrained(tmp_path / "model"))


def test_processor_is_saved_beside_the_model(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "b")))
    save_folder(truncated(build("bert")), tmp_path / "model", tokenizer)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")("a")["input_ids"] == [0]


def test_dense_folders_need_nothing_of_ours(tmp_path):
    model = build("bert")
    save_folder(model, tmp_path / "dense")
    assert "quantization_config" not in config_of(tmp_path / "dense")
    assert "transformers_weights" not in config_of(tmp_path / "dense")
    assert_same(model, from_pretrained(tmp_path / "dense"))
    truncated(model)
    save_folder(model, tmp_path / "factored")
    again = densify(from_pretrained(tmp_path / "factored"))
    save_folder(again, tmp_path / "densified")
    assert "quantization_config" not in config_of(tmp_path / "densified")
    assert_same(again, from_pretrained(tmp_path / "densified"))


def test_dense_weights_are_never_allocated(saved, monkeypatch):
    devices = set()
    original = registration.factorize_empty

    def spy(model, ranks, shared):
        devices.update(model.get_submodule(name).weight.device.type for name in ranks)
        return original(model, ranks, shared)

    monkeypatch.setattr(registration, "factorize_empty", spy)
    from_pretrained(saved[1])
    assert devices == {"meta"}


def test_dtype_and_device_on_request(saved):
    loaded = from_pretrained(saved[1], dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}


def test_loaded_models_are_ordinary_models(saved):
    loaded = from_pretrained(saved[1])
    assert loaded.half().dtype == torch.float16
    assert loaded.float().dtype == torch.float32


def test_auto_model(saved):
    model, folder = saved
    register_auto_model()
    register_auto_model()
    assert_same(model, AutoModelForSequenceClassification.from_pretrained(folder))
    assert_same(model.bert, AutoModel.from_pretrained(folder))


def test_a_bare_model_read_as_a_task_model(tmp_path):
    model = truncated(build("bert")).bert
    save_folder(model, tmp_path / "model")
    assert type(from_pretrained(tmp_path / "model")) is BertModel
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert_same(model, loaded.bert)


def test_an_unregistered_process_gets_an_error_not_random_weights(saved):
    code = (
        "import sys; from transformers import AutoModel, BertForSequenceClassification as Bert\n"
        "for cls in (AutoModel, Bert):\n"
        "    try: cls.from_pretrained(sys.argv[1])\n"
        "    except ValueError as error: assert 'register_auto_model' in str(error), error\n"
        "    else: sys.exit('loaded')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved[1])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_generation_after_loading(tmp_path):
    model = truncated(build("gpt2"))
    save_folder(model, tmp_path / "model")
    register_auto_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompt = torch.tensor([[3, 4, 5]])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **options), loaded.generate(prompt, **options))


def test_a_folder_in_the_way_is_not_touched(saved):
    model, folder = saved
    before = contents(folder)
    with pytest.raises(InputError, match="not empty"):
        save_folder(model, folder)
    assert contents(folder) == before
    (folder.parent / "empty").mkdir()
    save_folder(model, folder.parent / "empty")
    assert contents(folder.parent / "empty") == before


def test_a_failure_leaves_nothing_behind(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_folder(truncated(build("bert")), tmp_path / "model", Broken())
    assert list(tmp_path.iterdir()) == []


def test_mixed_dtypes_are_refused(tmp_path):
    model = truncated(build("bert", torch.bfloat16))
    model.classifier.float()
    with pytest.raises(InputError, match=r"torch\.bfloat16, torch\.float32"):
        save_folder(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_quantisation_is_refused(tmp_path):
    model = build("bert")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(InputError, match="gptq"):
        save_folder(model, tmp_path / "model")


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{QUERY}.down.weight"), f"missing: {QUERY}.down.weight"),
        (lambda t: t.pop("classifier.bias"), "missing: classifier.bias"),
        (lambda t: t.update({f"{QUERY}.weight": torch.ones(32, 32)}), f"unexpected: {QUERY}.weight"),
        (lambda t: t.update({f"{QUERY}.up.weight": torch.ones(32, 7)}), r"wrong shape: .*query.up.weight is \(32, 7\)"),
    ],
)
def test_every_tensor_must_be_accounted_for(saved, change, message):
    change_weights(saved[1], change)
    with pytest.raises(InputError, match=message):
        from_pretrained(saved[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "prehab_lowrank", "format_version": 2, "ranks": {}}}, "version 2"),
        ({"quantization_config": {"quant_method": "prehab_lowrank", "ranks": {"bert.pooler.dense": 0}}}, "positive"),
        ({"quantization_config": {"quant_method": "prehab_lowrank", "ranks": [3]}}, "malformed"),
        ({"quantization_config": {"quant_method": "prehab_lowrank", "colour": 3}}, "malformed"),
        ({"quantization_config": {"quant_method": "prehab_lowrank", "ranks": {"bert.nowhere": 2}}}, "bert.nowhere"),
        ({"quantization_config": None}, "do not fit"),
        ({"architectures": None}, "architectures"),
        ({"architectures": ["NoSuchModel"]}, "NoSuchModel"),
        ({"model_type": "no-such-type"}, "no-such-type"),
    ],
)
def test_a_wrong_config_is_named(saved, changes, message):
    edit_config(saved[1], **changes)
    with pytest.raises(InputError, match=message):
        from_pretrained(saved[1])


def test_folders_that_hold_no_model(saved, tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no config\.json"):
        from_pretrained(tmp_path / "nowhere")
    weights = saved[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(InputError, match="cannot load"):
        from_pretrained(saved[1])
    weights.unlink()
    (saved[1] / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="cannot load"):
        from_pretrained(saved[1])
    (saved[1] / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json"):
        from_pretrained(saved[1])


def random_factors(layer):
    m, n = layer.weight.shape
    bias = None if layer.bias is None else layer.bias.detach()
    return Factors(torch.randn(m, 8), torch.randn(8, n), bias)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared models beside the repository")
@pytest.mark.parametrize("name", ["vit-cifar10", "minilm-sst2", "llama-wiki"])
def test_trained_models(name, tmp_path):
    model = from_pretrained(SHARED / "models" / name)
    layers = {layer: dense for layer, dense in linears(model).items() if ".1." in layer}
    assert layers
    factorize(model, {layer: random_factors(dense) for layer, dense in layers.items()})
    save_folder(model, tmp_path / "model")
    assert_same(model, from_pretrained(tmp_path / "model"))
