"""Exported graphs against PyTorch: parity, names, fusions, determinism, and what is left of the model."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from small_models import FAMILIES, TEXT, build, truncated
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BigBirdConfig,
    BigBirdForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    ConvNextConfig,
    ConvNextForImageClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from converters.errors import InputError
from converters.onnx.attention import ONNX_ATTENTION, attention_implementation
from converters.onnx.expected import OPERATORS, counting, missing, spelled_out
from converters.onnx.export import export_onnx
from converters.onnx.form import GraphForm
from converters.onnx.fuse import simplify_graph
from converters.onnx.generate import greedy_decode
from converters.onnx.inputs import ordinary_tokens, text_inputs
from converters.onnx.runtime import open_session
from converters.onnx.write import write_graph

TOLERANCE = 5e-6  # max |Δ| over max |logit|; PyTorch against itself with another attention differs by 1e-6

GROUPED = {**TEXT, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
FAMILIES = {
    **FAMILIES,
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**TEXT, type_vocab_size=1)),
    "mistral": (MistralForCausalLM, MistralConfig(**GROUPED, sliding_window=4)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**GROUPED, head_dim=16)),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**TEXT)),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**GROUPED, head_dim=16, sliding_window=4)),
    "cohere": (CohereForCausalLM, CohereConfig(**TEXT, pad_token_id=0)),
    "modernbert": (ModernBertForSequenceClassification, ModernBertConfig(**{**TEXT, **SPECIAL})),
    "llama-classifier": (
        LlamaForSequenceClassification,
        LlamaConfig(**{**GROUPED, "num_hidden_layers": 1}, pad_token_id=1, num_labels=3),
    ),
}
TASKS = {"vit": "image-classification", "deit": "image-classification"}
TASKS |= dict.fromkeys(["bert", "roberta", "distilbert", "modernbert", "llama-classifier"], "text-classification")
SLOW = pytest.mark.slow


def make(family, rank=None):
    model_class, config = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class._from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)  # equal tensors are stored once, under one name
    return model if rank is None else truncated(model, rank)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """export(family, rank, fuse) → (model, OnnxExport), each done once."""
    done = {}

    def export(family, rank=None, fuse=True):
        key = (family, rank, fuse)
        if key not in done:
            model = make(family, rank)
            folder = tmp_path_factory.mktemp("graph")
            task = TASKS.get(family, "text-generation")
            done[key] = model, export_onnx(model, task, folder / "model.onnx", GraphForm(fuse=fuse))
        return done[key]

    return export


def relative(actual, expected, where=...):
    expected = expected.numpy()
    return np.abs(actual - expected)[where].max() / np.abs(expected).max()


def padded(batch, length, padding):
    """An attention mask whose first row is padded on the right (padding > 0) or on the left (< 0)."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if padding > 0:
        mask[0, -padding:] = 0
    mask[0, : max(-padding, 0)] = 0
    return mask


@pytest.mark.parametrize(("family", "rank"), [("vit", None), ("vit", 6), pytest.param("deit", 6, marks=SLOW)])
def test_images_match_pytorch_at_any_batch(exported, family, rank):
    model, export = exported(family, rank)
    session = open_session(export.path)
    for batch in (1, 2, 5):
        pixels = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            expected = model(pixels).logits
        assert relative(session.run(None, {"pixel_values": pixels.numpy()})[0], expected) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "rank"),
    [
        ("bert", None),
        ("bert", 6),
        pytest.param("roberta", None, marks=SLOW),
        pytest.param("distilbert", 6, marks=SLOW),
        pytest.param("modernbert", None, marks=SLOW),
        ("llama-classifier", None),
    ],
)
@pytest.mark.parametrize("fuse", [True, pytest.param(False, marks=SLOW)])
def test_texts_match_pytorch_with_padding_on_either_side(exported, family, rank, fuse):
    model, export = exported(family, rank, fuse)
    session = open_session(export.path)
    for batch, length, padding in [(1, 1, 0), (2, 7, 0), (3, 9, 2), (3, 9, -2)]:
        mask = padded(batch, length, padding)
        ids = torch.randint(3, 50, (batch, length))
        ids[mask == 0] = model.config.pad_token_id or 0
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(0, 2, ids.shape)}
        feed = {name: feed[name] for name in export.inputs}
        with torch.no_grad():
            expected = model(**feed).logits
        actual = session.run(None, {name: value.numpy() for name, value in feed.items()})[0]
        assert relative(actual, expected) < TOLERANCE


# (batch, new tokens, past, padding): prompts, decoding steps, and several new tokens after a past.
STEPS = [(1, 4, 0, 0), (2, 6, 0, 2), (2, 6, 0, -2), (1, 1, 7, 0), (3, 1, 7, -2), (2, 3, 5, 0), (2, 3, 5, -2)]


@pytest.mark.parametrize(
    ("family", "rank"),
    [
        ("llama-tied", 6),
        ("mistral", None),
        *(
            pytest.param(family, rank, marks=SLOW)
            for family in ("llama", "gpt2", "qwen2", "qwen3", "opt", "gpt-neox", "gemma2")
            for rank in (None, 6)
        ),
    ],
)
@pytest.mark.parametrize("fuse", [True, pytest.param(False, marks=SLOW)])
def test_decoders_match_one_pass_of_pytorch_without_a_cache(exported, family, rank, fuse):
    model, export = exported(family, rank, fuse)
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


def in_two_parts(session, feed, past):
    """Logits of the tokens after ``past``, the tokens before it having gone through the cache."""
    cache = {
        value.name: np.zeros((len(feed["input_ids"]), value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    if past:
        first = {name: value[:, :past] for name, value in feed.items()}
        cache = dict(zip(cache, session.run(None, first | cache)[1:], strict=True))
    rest = {name: value if name == "attention_mask" else value[:, past:] for name, value in feed.items()}
    return session.run(None, rest | cache)[0]


def test_greedy_decoding_gives_the_tokens_of_pytorch(exported):
    model, export = exported("llama-tied", 6)
    tokens = torch.tensor([[5, 9, 23], [7, 41, 8]])
    actual = greedy_decode(open_session(export.path), tokens.numpy(), 6)
    for _ in range(6):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    np.testing.assert_array_equal(actual, tokens.numpy())


def test_greedy_decoding_needs_a_cache_and_a_prompt(exported):
    with pytest.raises(InputError, match="past_key_values"):
        greedy_decode(open_session(exported("bert")[1].path), np.ones((1, 2), np.int64), 1)
    with pytest.raises(InputError, match="input_ids"):
        greedy_decode(open_session(exported("mistral")[1].path), np.ones((1, 0), np.int64), 1)


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("vit", {"ScaledDotProductAttention": 2, "LayerNormalization": 5, "Gelu": 2}),
        ("bert", {"ScaledDotProductAttention": 2, "LayerNormalization": 5, "Gelu": 2}),
    ],
)
def test_dense_and_factored_encoders_are_fused_alike(exported, family, counts):
    for rank in (None, 6):
        assert exported(family, rank)[1].fusions == counts


@pytest.mark.parametrize("family", ["vit", "bert"])
@pytest.mark.parametrize("rank", [None, 6])
def test_encoders_attend_without_turning_heads_and_tokens_round(exported, family, rank):
    """What is left is the one transpose of a ViT's patches."""
    graph = onnx.load(exported(family, rank)[1].path).graph
    assert [node.op_type for node in graph.node].count("Transpose") == (family == "vit")


def test_decoders_are_fused(exported):
    counts = {
        "ScaledDotProductAttention": 2,
        "RMSNormalization": 5,
        "RotaryEmbedding": 4,
    }
    assert exported("mistral", None)[1].fusions == counts
    assert exported("llama-tied", 6)[1].fusions == counts


def test_plain_graphs_use_standard_operators_of_an_older_opset(exported):
    export = exported("vit", None, fuse=False)[1]
    graph = onnx.load(export.path)
    assert {node.domain for node in graph.graph.node} == {""}
    assert export.opset == 20
    assert not graph.functions


def test_what_was_written_is_reported(exported):
    export = exported("mistral", None)[1]
    session = open_session(export.path)
    cache = [f"{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    assert export.inputs == (
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{name}" for name in cache),
    )
    assert export.outputs == ("logits", *(f"present.{name}" for name in cache))
    assert tuple(value.name for value in session.get_inputs()) == export.inputs
    assert tuple(value.name for value in session.get_outputs()) == export.outputs
    assert export.bytes == export.path.stat().st_size
    assert session.get_inputs()[3].shape == ["batch_size", 2, "past_sequence_length", 8]


def test_weights_keep_their_names(exported):
    model, export = exported("bert", 6)
    stored = {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(export.path).graph.initializer}
    name = "bert.encoder.layer.1.intermediate.dense"
    layer = model.get_submodule(name)
    np.testing.assert_array_equal(stored[f"{name}.down.weight.T"], layer.down.weight.detach().numpy().T)
    np.testing.assert_array_equal(stored[f"{name}.up.weight.T"], layer.up.weight.detach().numpy().T)
    np.testing.assert_array_equal(stored[f"{name}.up.bias"], layer.up.bias.detach().numpy())
    names = [f"bert.encoder.layer.1.attention.self.{part}" for part in ("query", "key", "value")]
    downs = [model.get_submodule(name).down.weight.detach().numpy().T for name in names]
    stacked = stored["bert.encoder.layer.1.attention.self.{query,key,value}.down.weight.T"]
    np.testing.assert_array_equal(stacked, np.concatenate(downs, axis=1))
    unnamed = [value for name, value in stored.items() if name.startswith("constant_")]
    assert max(value.size for value in unnamed) < 64


def test_nothing_of_the_exporting_machine_is_left_in_the_graph(exported):
    graph = onnx.load(exported("mistral", None)[1].path)
    assert not graph.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
    text = str(graph.SerializeToString())
    assert str(Path.home()) not in text
    assert ".py" not in text


@pytest.mark.parametrize(("family", "rank"), [("vit", 6), ("bert", None), ("llama-tied", 6)])
def test_onnxruntime_can_quantise_the_graph(exported, tmp_path, family, rank):
    export = exported(family, rank)[1]
    quantize_dynamic(export.path, tmp_path / "int8.onnx", weight_type=QuantType.QInt8)
    feed = {value.name: feed_of(value) for value in open_session(export.path).get_inputs()}
    actual = open_session(tmp_path / "int8.onnx").run(["logits"], feed)[0]
    expected = open_session(export.path).run(["logits"], feed)[0]
    assert relative(actual, torch.from_numpy(expected)) < 0.2


def feed_of(value):
    sizes = {"batch_size": 2, "sequence_length": 4, "total_sequence_length": 4, "past_sequence_length": 0}
    shape = [sizes.get(axis, axis) for axis in value.shape]
    if value.type == "tensor(int64)":
        return np.ones(shape, np.int64)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


EXPORT_ANEW = """
import sys
from pathlib import Path
from converters.onnx.export import export_onnx
sys.path.insert(0, "tests")
from test_onnx_export import make
export_onnx(make("vit", 6), "image-classification", Path(sys.argv[1]))
"""


def test_equal_weights_make_equal_files_in_every_process(exported, tmp_path):
    path = tmp_path / "again.onnx"
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", EXPORT_ANEW, str(path)], cwd=root, check=True, capture_output=True)
    first, second = (hashlib.sha256(file.read_bytes()) for file in (exported("vit", 6)[1].path, path))
    assert first.hexdigest() == second.hexdigest()


def test_external_data_moves_with_the_folder(tmp_path, capfd):
    model = make("vit", 6)
    (tmp_path / "here").mkdir()
    export = export_onnx(
        model, "image-classification", tmp_path / "here" / "net.onnx", GraphForm(external_data_threshold=1000)
    )
    assert "".join(capfd.readouterr()) == ""  # the exporter's chatter is nobody's business
    assert sorted(file.name for file in export.path.parent.iterdir()) == ["net.onnx", "net.onnx_data"]
    assert export.bytes == sum(file.stat().st_size for file in export.path.parent.iterdir())
    export.path.parent.rename(tmp_path / "there")
    pixels = torch.randn(1, 3, 16, 16)
    actual = open_session(tmp_path / "there" / "net.onnx").run(None, {"pixel_values": pixels.numpy()})[0]
    with torch.no_grad():
        assert relative(actual, model(pixels).logits) < TOLERANCE


def test_the_model_is_handed_back_as_it_was(tmp_path):
    model = build("bert").train()
    model.bert.encoder.layer[0].eval()
    model.config.use_cache = True
    training = [module.training for module in model.modules()]
    attention = model.config._attn_implementation
    weights = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    export_onnx(model, "text-classification", tmp_path / "model.onnx", GraphForm(text_inputs=["input_ids"]))
    assert [module.training for module in model.modules()] == training
    assert model.config._attn_implementation == attention
    assert model.config.use_cache is True
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert value.data_ptr() == weights[name][0]
        assert torch.equal(value, weights[name][1])


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("offered", [None, ["input_ids"], ["input_ids", "token_type_ids", "attention_mask", "labels"]])
def test_text_inputs_are_what_both_tokenizer_and_model_know(family, offered):
    known = ("input_ids", "attention_mask") + ("token_type_ids",) * (family == "bert")
    expected = tuple(name for name in known if offered is None or name in offered)
    assert text_inputs(make(family), offered).names == expected


def fresh(model_class, config):
    torch.manual_seed(0)
    return model_class._from_config(config).eval()


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (
            BartForSequenceClassification,
            BartConfig(
                vocab_size=50,
                d_model=32,
                num_labels=3,
                max_position_embeddings=32,
                encoder_layers=1,
                encoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_layers=1,
                decoder_attention_heads=4,
                decoder_ffn_dim=64,
            ),
        ),
        (
            MobileBertForSequenceClassification,
            MobileBertConfig(
                **{**TEXT, "num_hidden_layers": 1}, embedding_size=16, true_hidden_size=16, intra_bottleneck_size=16
            ),
        ),
    ],
)
def test_models_that_look_for_the_end_of_a_text_and_models_without_one(tmp_path, model_class, config):
    model = fresh(model_class, config)
    export = export_onnx(model, "text-classification", tmp_path / "model.onnx")
    ids = torch.randint(5, 50, (3, 9))
    ids[:, -1] = 2
    feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    feed = {name: feed[name] for name in export.inputs}
    with torch.no_grad():
        expected = model(**feed).logits
    actual = open_session(export.path).run(None, {name: value.numpy() for name, value in feed.items()})[0]
    assert relative(actual, expected) < TOLERANCE


@pytest.mark.parametrize("end", [2, [3, 2], None, 10**6])
def test_made_up_tokens_end_as_texts_do(end):
    config = LlamaConfig(vocab_size=50, eos_token_id=end, pad_token_id=1)
    ids = ordinary_tokens(config, 2, 4)
    ends = [token for token in ([end] if isinstance(end, int) else end or []) if token < 50]
    assert ids.shape == (2, 4)
    assert ids[:, 4 - len(ends) :].tolist() == [ends, ends]
    assert not {1, *ends} & set(ids[:, : 4 - len(ends)].flatten().tolist())


def test_samples_are_what_the_model_is_traced_with(tmp_path):
    model = make("bert")
    samples = {"input_ids": torch.randint(3, 50, (5, 7)), "attention_mask": padded(5, 7, 3)}
    ran = []
    model.register_forward_pre_hook(lambda module, args, options: ran.append(options), with_kwargs=True)
    export = export_onnx(model, "text-classification", tmp_path / "model.onnx", samples=samples)
    assert torch.equal(ran[0]["input_ids"], samples["input_ids"][:2])
    assert torch.equal(ran[0]["attention_mask"], samples["attention_mask"][:2])
    assert open_session(export.path).get_inputs()[0].shape == ["batch_size", "sequence_length"]


def test_one_short_sample_does_not_fix_the_size_of_the_graph(tmp_path):
    model = make("bert")
    samples = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    export = export_onnx(model, "text-classification", tmp_path / "model.onnx", samples=samples)
    assert open_session(export.path).get_inputs()[0].shape == ["batch_size", "sequence_length"]


def test_a_family_that_would_look_token_types_up_among_its_words_is_not_given_any():
    gpt2 = GPT2ForSequenceClassification._from_config(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, pad_token_id=0)
    )
    assert text_inputs(gpt2, ["input_ids", "token_type_ids"]).names == ("input_ids",)
    xlnet = XLNetForSequenceClassification._from_config(
        XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=4, d_inner=64)
    )
    assert text_inputs(xlnet, ["input_ids", "token_type_ids"]).names == ("input_ids", "token_type_ids")


def test_a_failed_export_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(path):
        raise onnx.checker.ValidationError("broken")

    monkeypatch.setattr(onnx.checker, "check_model", fail)
    with pytest.raises(onnx.checker.ValidationError):
        export_onnx(build("vit"), "image-classification", tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        (MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50), MambaForCausalLM),
        (
            Qwen3NextConfig(**{**GROUPED, "num_hidden_layers": 4}, head_dim=16, num_experts=4, num_experts_per_tok=2),
            Qwen3NextForCausalLM,
        ),
    ],
)
def test_decoders_without_a_plain_cache_are_refused(tmp_path, config, model_class):
    model = model_class._from_config(config).eval()
    with pytest.raises(InputError, match="key"):
        export_onnx(model, "text-generation", tmp_path / "model.onnx")


def test_mistakes_are_named(tmp_path):
    model = build("bert")
    with pytest.raises(InputError, match="unknown task 'chat'"):
        export_onnx(model, "chat", tmp_path / "model.onnx")
    with pytest.raises(InputError, match="image_size"):
        export_onnx(model, "image-classification", tmp_path / "model.onnx")
    with pytest.raises(InputError, match="input_ids"):
        export_onnx(model, "text-classification", tmp_path / "model.onnx", GraphForm(text_inputs=["attention_mask"]))
    with pytest.raises(InputError, match="folder"):
        export_onnx(model, "text-classification", tmp_path)
    with pytest.raises(InputError, match="no ONNX graph"):
        open_session(tmp_path / "missing.onnx")


def test_a_model_that_torch_cannot_trace_is_named(tmp_path, monkeypatch):
    model = build("vit")
    original = type(model).forward

    def branching(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        if output.logits.sum() > 0:
            output.logits = output.logits + 1
        return output

    monkeypatch.setattr(type(model), "forward", branching)
    with pytest.raises(RuntimeError, match="could not export ViTForImageClassification"):
        export_onnx(model, "image-classification", tmp_path / "model.onnx")


def test_sessions_state_their_threads(exported):
    session = open_session(exported("vit")[1].path, threads=2)
    options = session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_a_graph_written_piece_by_piece_is_the_one_that_onnx_reads(exported, tmp_path):
    """Bytes written by hand against the message as protocol buffers make it."""
    path = exported("bert", 6)[1].path
    model = ir.load(path)
    write_graph(model, tmp_path / "again.onnx")
    ours, whole = onnx.load(tmp_path / "again.onnx"), ir.serde.serialize_model(model)
    onnx.checker.check_model(ours, full_check=True)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in ours.graph.initializer}
    assert len(weights) == len(whole.graph.initializer)
    for tensor in whole.graph.initializer:
        np.testing.assert_array_equal(weights[tensor.name], onnx.numpy_helper.to_array(tensor))
    for proto in (ours, whole):
        del proto.graph.initializer[:], proto.graph.value_info[:]  # the shapes of the weights are theirs to tell
    assert ours == whole
    assert list(model.graph.initializers) == list(ir.load(path).graph.initializers)


def test_an_invalid_graph_is_not_written(exported, tmp_path):
    model = ir.load(exported("bert", 6)[1].path)
    next(node for node in model.graph if node.op_type == "MatMul").op_type = "NoSuchOperator"
    with pytest.raises(onnx.checker.ValidationError):
        write_graph(model, tmp_path / "broken.onnx")
    assert not (tmp_path / "broken.onnx").exists()
    assert len(model.graph.initializers) == len(ir.load(exported("bert", 6)[1].path).graph.initializers)


@pytest.mark.parametrize("family", ["vit", "bert", "mistral"])
def test_a_session_keeps_norms_and_residual_sums_apart(exported, family, tmp_path):
    """What is taken apart because the fused kernel is slow must not come back when a session optimises the graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(exported(family, 6)[1].path, options)
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert not kinds & {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
    assert "Sum" in kinds


@pytest.mark.parametrize(("family", "blocks"), [("vit", 2), ("bert", 2), ("mistral", 2)])
def test_what_should_be_fused_is_counted_in_the_model(exported, family, blocks):
    model, export = exported(family, 6)
    assert export.warnings == ()
    with attention_implementation(model, ONNX_ATTENTION), counting(model) as seen, torch.no_grad():
        if family == "vit":
            model(torch.zeros(1, 3, model.config.image_size, model.config.image_size))
        else:
            model(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 4, dtype=torch.long))
    assert seen["GELU"] == (0 if family == "mistral" else blocks)
    assert seen["attention"] == blocks
    assert seen["norm"] == 2 * blocks + 1
    assert missing(seen, export.fusions) == []
    assert not any(module._forward_hooks for module in model.modules())


def test_a_fusion_that_did_not_happen_is_said(exported, tmp_path, monkeypatch):
    model = exported("mistral", 6)[0]
    monkeypatch.setattr("converters.onnx.export.fuse_graph", simplify_graph)
    export = export_onnx(model, "text-generation", tmp_path / "model.onnx")
    assert any("5 of 5 norms are not one operator each" in warning for warning in export.warnings)


PIXELS = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "image_size": 32}


@pytest.mark.parametrize(
    ("config", "model_class", "fused", "said"),
    [
        (ConvNextConfig(**PIXELS), ConvNextForImageClassification, 0, 0),  # has no attention
        (BigBirdConfig(**TEXT, attention_type="original_full"), BigBirdForSequenceClassification, 2, 0),
        (BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4), BloomForCausalLM, 0, 2),
    ],
    ids=["none", "fused", "plain"],
)
def test_plain_attention_is_judged_by_the_graph(config, model_class, fused, said, tmp_path):
    """None of the three takes its attention from the registry of transformers."""
    torch.manual_seed(0)
    model = model_class._from_config(config).eval()
    task = {"ConvNext": "image-classification", "BigBird": "text-classification"}
    kind = next((task[name] for name in task if type(model).__name__.startswith(name)), "text-generation")
    export = export_onnx(model, kind, tmp_path / "model.onnx")
    attentions = sum(export.fusions.get(name, 0) for name in ("Attention", "MultiHeadAttention"))
    warnings = [warning for warning in export.warnings if "attention" in warning]
    assert attentions == fused
    assert [warning.split(" ")[0] for warning in warnings] == ([str(said)] if said else [])
    assert all("registry" in warning for warning in warnings)


@pytest.mark.parametrize("family", ["vit", "gpt2", "mistral", "cohere"])
def test_a_plain_graph_spells_out_what_the_model_goes_through(family, tmp_path, monkeypatch):
    """The forms that the finished graph is searched for, against what the modules count."""
    model = make(family)
    monkeypatch.setattr("converters.onnx.export.fuse_graph", simplify_graph)
    export = export_onnx(model, TASKS.get(family, "text-generation"), tmp_path / "model.onnx")
    graph = ir.load(tmp_path / "model.onnx").graph
    with counting(model) as seen, torch.no_grad(), attention_implementation(model, ONNX_ATTENTION):
        ones = torch.ones(1, 4, dtype=torch.long)
        model(torch.rand(1, 3, 16, 16)) if family == "vit" else model(ones, attention_mask=ones)
    rotary = {"mistral": 4, "cohere": 4}.get(family, 0)
    found = spelled_out(graph)
    fused = {kind: sum(export.fusions.get(name, 0) for name in names) for kind, names in OPERATORS.items()}
    assert found["norm"] + fused["norm"] == seen["norm"] > 0
    assert found["GELU"] + fused["GELU"] == seen["GELU"]
    assert found["rotary embedding"] == rotary
    assert found["attention"] == 0


def test_attention_that_the_operator_cannot_do_is_said(exported):
    assert any("softcap" in warning for warning in exported("gemma2", 6)[1].warnings)
