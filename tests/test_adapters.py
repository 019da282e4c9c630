import copy
import json

import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import build, inputs, linears, logits, truncated

from converters.adapters import check_adapter, check_fit, merge_dense_adapter, merge_into_factors
from converters.errors import InputError
from converters.folder import from_pretrained, save_folder
from converters.lowrank import dense_weight, densify, factors_of, low_rank_layers

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def train(model, folder, config=LoraConfig, **options):
    """An adapter with random weights on a copy of the model, saved; returns the logits that PEFT computes."""
    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(model), config(**options)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted(**inputs(model)).logits


ADAPTERS = {
    "bert: plain": ("bert", {"r": 4, "target_modules": ["query", "value"]}),
    "bert: rank-stabilised, all linears, biases of theirs, task head": (
        "bert",
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear", "bias": "lora_only"}
        | {"task_type": "SEQ_CLS"},
    ),
    "bert: all biases, a head, patterns": (
        "bert",
        {"r": 4, "target_modules": ["query", "intermediate.dense"], "bias": "all", "modules_to_save": ["classifier"]}
        | {"rank_pattern": {"layer.0.attention.self.query": 2}, "alpha_pattern": {"intermediate.dense": 7}},
    ),
    "bert: bias in B": ("bert", {"r": 4, "target_modules": ["query"], "lora_bias": True}),
    "vit: regular expression": (
        "vit",
        {"r": 3, "target_modules": "|".join(name for name in linears(build("vit")) if ".0." in name)},
    ),
    "llama: causal": ("llama-tied", {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}),
    "gpt2: Conv1D": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2: embedding": ("gpt2", {"r": 4, "target_modules": ["wpe", "c_fc"], "fan_in_fan_out": True}),
}


LLAMA, BERT, GPT2 = (["q_proj", "down_proj"], ["query", "intermediate.dense"], ["c_attn", "c_fc"])
# All but plain LoRA: PEFT merges it into dense weights, two factors have no room for it.
METHODS = {
    "DoRA": ("llama", LoraConfig, {"r": 4, "use_dora": True, "target_modules": LLAMA}),
    "DoRA, Conv1D": ("gpt2", LoraConfig, {"r": 4, "use_dora": True, "target_modules": GPT2, "fan_in_fan_out": True}),
    "VeRA": ("bert", peft.VeraConfig, {"r": 4, "target_modules": BERT}),
    "VeRA without its projection": (
        "llama",
        peft.VeraConfig,
        {"r": 4, "target_modules": ["q_proj"], "save_projection": False},
    ),
    "IA3": ("llama", IA3Config, {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "IA3, Conv1D": (
        "gpt2",
        IA3Config,
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
    ),
    "LoHa": ("bert", peft.LoHaConfig, {"r": 4, "target_modules": BERT}),
    "LoHa, images": ("vit", peft.LoHaConfig, {"r": 4, "target_modules": "|".join(linears(build("vit")))}),
    "LoKr, a head": ("bert", peft.LoKrConfig, {"r": 4, "target_modules": BERT, "modules_to_save": ["classifier"]}),
    "OFT": ("llama", peft.OFTConfig, {"r": 0, "oft_block_size": 8, "target_modules": LLAMA}),
    "BOFT": ("llama", peft.BOFTConfig, {"boft_block_size": 4, "target_modules": LLAMA}),
    "FourierFT": ("llama", peft.FourierFTConfig, {"n_frequency": 40, "target_modules": LLAMA}),
    "AdaLoRA": ("llama", peft.AdaLoraConfig, {"init_r": 4, "total_step": 10, "target_modules": LLAMA}),
    "HRA": ("llama", peft.HRAConfig, {"r": 4, "target_modules": LLAMA}),
    "VB-LoRA": ("llama", peft.VBLoRAConfig, {"num_vectors": 16, "vector_length": 8, "target_modules": LLAMA}),
    "SHiRA": ("llama", peft.ShiraConfig, {"r": 2, "target_modules": ["q_proj"]}),
    "norms": ("llama-tied", peft.LNTuningConfig, {"target_modules": ["input_layernorm", "norm"]}),
    "tokens": ("llama", peft.TrainableTokensConfig, {"token_indices": [3, 9], "target_modules": ["embed_tokens"]}),
    "tokens, tied": (
        "llama-tied",
        LoraConfig,
        {"r": 4, "trainable_token_indices": [3, 9], "target_modules": ["q_proj"]},
    ),
    "bare parameters": (
        "llama",
        LoraConfig,
        {"r": 4, "target_modules": [], "target_parameters": ["mlp.gate_proj.weight"]},
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_whatever_peft_merges_exactly_is_merged_into_the_dense_model(method, tmp_path):
    family, config, options = METHODS[method]
    model = build(family)
    want = train(model, tmp_path, config, **options)
    assert (want - logits(model)).abs().max() > 1e-3
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    check_fit(skeleton, tmp_path)
    tied = getattr(model.config, "tie_word_embeddings", None)
    merge_dense_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=2e-5)
    assert getattr(model.config, "tie_word_embeddings", None) is tied
    with pytest.raises(InputError, match=r"only plain LoRA can; merge it before compression"):
        merge_into_factors(truncated(build(family)), tmp_path)


# What an adapter may do to tied weights → whether they are still tied when it is merged.
TIED = {
    "both replaced": ({"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}, False),
    "the embedding replaced": ({"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}, False),
    "the head replaced": ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, False),
    "both replaced and kept tied": (
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"], "ensure_weight_tying": True},
        True,
    ),
    "a pair on the embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, False),
    "a pair on the head": ({"target_modules": ["lm_head"]}, False),
    "a pair each": ({"target_modules": ["embed_tokens", "lm_head"]}, False),
    "one pair for both": ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, True),
    "a pair on one, the other replaced": ({"modules_to_save": ["lm_head"], "target_modules": ["embed_tokens"]}, False),
}


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("factored", [False, True])
def test_tied_weights_are_untied_where_an_adapter_tells_them_apart(case, factored, tmp_path):
    options, tied = TIED[case]
    model = build("llama-tied")
    want = train(model, tmp_path / "adapter", r=4, **options)
    assert (want - logits(model)).abs().max() > 1e-3
    if factored:
        merge_into_factors(truncated(model, rank=32), tmp_path / "adapter")
    else:
        with torch.device("meta"):
            check_fit(type(model)(model.config), tmp_path / "adapter")
        merge_dense_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    save_folder(model, tmp_path / "model")
    assert torch.equal(logits(from_pretrained(tmp_path / "model")), logits(model))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("error::UserWarning")
def test_what_peft_says_of_ties_is_not_passed_on(tmp_path):
    model = build("llama-tied")
    with pytest.warns(UserWarning, match="tied layer"):
        train(model, tmp_path, r=4, target_modules=["embed_tokens"])
    merge_dense_adapter(model, tmp_path)


def test_other_ties_go_with_those_that_are_undone(tmp_path):
    """A BERT ties two tensors of its head, by one flag."""
    model = build("bert-mlm", tie_word_embeddings=True)
    want = train(model, tmp_path / "adapter", r=4, target_modules=["word_embeddings"])
    merge_dense_adapter(model, tmp_path / "adapter")
    save_folder(model, tmp_path / "model")
    torch.testing.assert_close(logits(from_pretrained(tmp_path / "model")), want, rtol=1e-5, atol=1e-5)


def test_what_peft_does_not_merge_exactly_is_refused(tmp_path, monkeypatch):
    train(build("bert"), tmp_path, r=4, target_modules=["query"])
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(InputError, match="does not merge this adapter exactly"):
        merge_dense_adapter(build("bert"), tmp_path)


@pytest.fixture(params=ADAPTERS)
def case(request, tmp_path):
    family, options = ADAPTERS[request.param]
    model = build(family)
    want = train(model, tmp_path / "adapter", **options)
    assert (want - logits(model)).abs().max() > 1e-3
    return model, tmp_path / "adapter", want


def test_dense_merge_computes_what_peft_computes(case):
    model, adapter, want = case
    modules = [name for name, _ in model.named_modules()]
    merged = merge_dense_adapter(model, adapter)
    assert merged is model
    assert [name for name, _ in model.named_modules()] == modules
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)


def test_factors_of_full_rank_lose_nothing(case):
    model, adapter, want = case
    truncated(model, rank=32, keep=lambda name: ".0." in name)
    report = merge_into_factors(model, adapter)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    assert all(layer.exact for layer in report.layers.values())
    assert set(report.layers) == set(check_adapter(adapter).ranks)


def test_retruncation_is_the_best_of_its_rank(case):
    model, adapter, _ = case
    truncated(model, rank=6, keep=lambda name: ".0." in name)
    before = factors_of(copy.deepcopy(model))
    dense = merge_dense_adapter(densify(copy.deepcopy(model)), adapter)
    generator = torch.Generator().manual_seed(3)
    metrics = {}
    for name, pair in before.items():
        sizes = pair.down.shape[1], pair.up.shape[0]
        roots = [torch.randn(size, size, generator=generator, dtype=torch.float64) for size in sizes]
        metrics[name] = tuple(root @ root.T for root in roots)
    report = merge_into_factors(model, adapter, metrics.get)
    for name, layer in low_rank_layers(model).items():
        C, G = metrics[name]
        left, right = torch.linalg.cholesky(G).T, torch.linalg.cholesky(C)
        full = dense_weight(dense.get_submodule(name)).detach().double()
        sigma = torch.linalg.svdvals(left @ full @ right)
        if name in report.layers:
            least = (sigma[6:].norm() / sigma.norm()).item()
            assert report.layers[name].error == pytest.approx(least, rel=1e-3, abs=1e-5)
            error = torch.linalg.matrix_norm(left @ (full - layer.weight.double()) @ right) / sigma.norm()
            assert error.item() == pytest.approx(least, rel=1e-3, abs=1e-5)
        else:
            assert torch.equal(layer.up.weight, before[name].up)
        assert layer.rank == 6


@pytest.mark.parametrize("family", ["bert", "vit", "llama-tied", "gpt2"])
def test_adapters_of_the_factors_merge_exactly(family, tmp_path):
    model = truncated(build(family))
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"]}
    want = train(model, tmp_path / "adapter", **options)
    assert (want - logits(model)).abs().max() > 1e-3
    report = merge_into_factors(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert all(layer.exact and layer.error == 0 for layer in report.layers.values())
    assert {layer.rank for layer in low_rank_layers(model).values()} == {6}


@pytest.mark.parametrize("method", ["DoRA", "VeRA", "IA3", "LoHa", "OFT"])
def test_other_methods_on_the_factors_merge_exactly(method, tmp_path):
    family, config, options = METHODS[method]
    model = truncated(build(family), rank=8)
    options = {**options, "target_modules": ["up"]} | ({"feedforward_modules": []} if method == "IA3" else {})
    want = train(model, tmp_path / "adapter", config, **options)
    assert (want - logits(model)).abs().max() > 1e-3
    report = merge_into_factors(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=2e-5)
    assert set(report.layers) == {f"{name}.up" for name in low_rank_layers(model)}


def test_merging_into_a_loaded_model_and_saving_it(tmp_path):
    dense = build("bert")
    want = train(dense, tmp_path / "adapter", r=4, target_modules=["query"])
    save_folder(truncated(dense, rank=32), tmp_path / "model")
    model = from_pretrained(tmp_path / "model")
    merge_into_factors(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    save_folder(model, tmp_path / "merged")
    assert torch.equal(logits(from_pretrained(tmp_path / "merged")), logits(model))


def test_half_precision(tmp_path):
    dense = build("llama", torch.bfloat16)
    want = train(dense, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    model = truncated(dense, rank=32)
    report = merge_into_factors(model, tmp_path / "adapter")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(layer.exact for layer in report.layers.values())
    torch.testing.assert_close(logits(model).float(), want.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("factored", [False, True])
def test_training_flags_are_kept(factored, tmp_path):
    model = build("bert").train()
    train(model, tmp_path / "adapter", r=4, target_modules=["query"], task_type="SEQ_CLS")
    model.bert.embeddings.requires_grad_(False)
    if factored:
        truncated(model)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    (merge_into_factors if factored else merge_dense_adapter)(model, tmp_path / "adapter")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(module.training for module in model.modules())


def test_check_adapter_reads_names_and_ranks(tmp_path):
    options = {"r": 4, "target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"}
    train(build("bert"), tmp_path, rank_pattern={"layer.1.attention.self.query": 2}, **options)
    info = check_adapter(tmp_path)
    query = "bert.encoder.layer.{}.attention.self.query"
    assert info.ranks == {query.format(0): 4, query.format(1): 2}
    assert {"classifier.weight", "classifier.bias", query.format(0) + ".bias"} <= set(info.replaced)


def assert_refused(model, adapter, message):
    """Both merges refuse, and neither changes the model."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for merge in (merge_dense_adapter, merge_into_factors):
        with pytest.raises(InputError, match=message):
            merge(model, adapter)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 64}, r"query\.lora_A.*\[4, 64\]"),
        ({"num_hidden_layers": 3}, r"another base: the model has no .*layer\.2\..*query"),
        ({"num_hidden_layers": 1}, r"another base: it has no .*layer\.1\..*query"),
    ],
)
@pytest.mark.parametrize("factored", [False, True])
def test_an_adapter_for_another_base_is_refused(other, message, factored, tmp_path):
    train(build("bert", **other), tmp_path, r=4, target_modules=["query"])
    model = build("bert")
    if factored:
        truncated(model)
        with pytest.raises(InputError, match=message):
            merge_into_factors(model, tmp_path)
        assert len(low_rank_layers(model)) > 0
    else:
        assert_refused(model, tmp_path, message)


@pytest.mark.parametrize("method", ["DoRA", "VeRA", "IA3", "LoHa", "LoKr, a head", "OFT", "VB-LoRA", "norms"])
@pytest.mark.parametrize(
    "other", [{"hidden_size": 64, "intermediate_size": 128}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}]
)
def test_other_methods_for_another_base_are_refused(method, other, tmp_path):
    family, config, options = METHODS[method]
    train(build(family, **other), tmp_path, config, **options)
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"another base|does not fit"):
        check_fit(model, tmp_path)
    with pytest.raises(InputError, match=r"another base|does not fit"):
        merge_dense_adapter(model, tmp_path)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_for_another_family_is_refused(tmp_path):
    train(build("bert"), tmp_path, r=4, target_modules=["query"])
    assert_refused(build("llama"), tmp_path, "does not fit the model: .*query")


def test_a_head_of_another_size_is_refused(tmp_path):
    train(build("bert", num_labels=5), tmp_path, r=4, target_modules=["query"], modules_to_save=["classifier"])
    assert_refused(build("bert"), tmp_path, r"classifier.*\[5")


def test_a_factored_layer_cannot_be_replaced_whole(tmp_path):
    dense = build("roberta")
    train(dense, tmp_path, r=4, target_modules=["query"], modules_to_save=["classifier"])
    with pytest.raises(InputError, match=r"replaces classifier whole.*classifier\.dense is factored"):
        merge_into_factors(truncated(dense), tmp_path)


@pytest.mark.parametrize("replaced", [["embed_tokens", "lm_head"], ["embed_tokens"], []])
def test_another_vocabulary_is_refused_with_advice(replaced, tmp_path):
    model = build("llama-tied")
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(60)
    options = {"modules_to_save": replaced} if replaced else {"trainable_token_indices": [55]}
    train(larger, tmp_path, r=4, target_modules=["q_proj"], **options)
    message = "another vocabulary: give the model with its embeddings resized" if replaced else "does not fit"
    with pytest.raises(InputError, match=message):
        merge_dense_adapter(model, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("family", "config", "options"),
    [
        ("llama", LoraConfig, {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("bert", IA3Config, {"target_modules": ["key"], "feedforward_modules": []}),
    ],
)
def test_weights_that_are_no_numbers_are_refused(family, config, options, value, tmp_path):
    model = build(family)
    train(model, tmp_path, config, **options)
    whole = load_file(tmp_path / "adapter_model.safetensors")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in whole:
        damaged = {key: tensor.clone() for key, tensor in whole.items()}
        damaged[name].view(-1)[0] = value
        save_file(damaged, tmp_path / "adapter_model.safetensors")
        with pytest.raises(InputError, match="holds NaN or Inf"):
            merge_dense_adapter(model, tmp_path)
        if config is LoraConfig:
            with pytest.raises(InputError, match="holds NaN or Inf"):
                merge_into_factors(truncated(build(family)), tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer replication"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING cannot be merged into weights"),
        ({"peft_type": "XLORA"}, "mixes adapters"),
        ({"peft_type": None}, "no peft_type"),
    ],
)
def test_what_no_weights_can_hold_is_refused(options, message, tmp_path):
    train(build("llama"), tmp_path, r=4, target_modules=["q_proj"])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    assert_refused(build("llama"), tmp_path, message)


def test_a_method_that_peft_does_not_know_is_named(tmp_path):
    train(build("bert"), tmp_path, r=4, target_modules=["query"])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "TOMORROW"}))
    with pytest.raises(InputError, match="TOMORROW"):
        merge_dense_adapter(build("bert"), tmp_path)


def test_prompts_as_peft_writes_them_are_refused(tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(build("llama"), config).save_pretrained(tmp_path)
    assert_refused(build("llama"), tmp_path, "PROMPT_TUNING cannot be merged into weights")


def test_folders_that_hold_no_adapter(tmp_path):
    train(build("bert"), tmp_path, r=4, target_modules=["query"])
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = load_file(weights)
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        check_adapter(tmp_path / "nowhere")
    first = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, weights)
    with pytest.raises(InputError, match="do not match"):
        check_adapter(tmp_path)
    save_file({"classifier.weight": torch.ones(2)}, weights)
    with pytest.raises(InputError, match="no LoRA pair"):
        check_adapter(tmp_path)
    weights.write_bytes(b"not tensors")
    with pytest.raises(InputError, match="not a readable"):
        check_adapter(tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle"):
        check_adapter(tmp_path)
    config.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        check_adapter(tmp_path)


def test_peft_reloads_onto_the_merged_base(tmp_path):
    """Nothing of PEFT stays on the model: the same adapter can be put on it again."""
    model = build("bert")
    train(model, tmp_path, r=4, target_modules=["query"])
    merge_dense_adapter(model, tmp_path)
    assert not hasattr(model, "peft_config")
    assert isinstance(PeftModel.from_pretrained(model, tmp_path), PeftModel)
