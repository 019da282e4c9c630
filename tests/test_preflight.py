"""What cannot be exported is refused before any slow work, and nothing else is."""

import numpy as np
import pytest
import torch
import transformers
from conftest import word_tokenizer
from test_pipeline import QUICK, invoke

from converters.errors import InputError
from converters.folder import save_folder
from converters.skeleton import skeleton
from prehab_export.deployment.exportability import check_exportable_model
from prehab_export.inputs.data.samples import Samples
from prehab_export.inputs.models import empty_model, make_model
from prehab_export.inputs.tasks import TASKS
from prehab_export.inputs.trial import check_runs

GENERATION, TEXT, IMAGE = TASKS["text-generation"], TASKS["text-classification"], TASKS["image-classification"]
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
DECODER = SIZES | {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MIXTURE = DECODER | {"num_hidden_layers": 2, "num_experts_per_tok": 2}


def texts(task):
    def collate(rows):
        ids = torch.randint(3, 60, (len(rows), 12))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return batch | ({"labels": torch.zeros(len(rows), dtype=torch.long)} if task is TEXT else {})

    return Samples(np.arange(6), collate)


def pictures(size):
    return Samples(np.arange(6), lambda rows: {"pixel_values": torch.randn(len(rows), 3, size, size)})


def check(config, task=GENERATION, samples=None):
    check_exportable_model(config, task, samples or texts(task), text_inputs=["input_ids", "attention_mask"])


def block_counts(model):
    return [len(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4), "key/value cache"),
        (transformers.RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "key/value cache"),
        (
            transformers.JambaConfig(
                **{**MIXTURE, "num_hidden_layers": 4}, attn_layer_period=4, attn_layer_offset=2, mamba_dt_rank=4
            ),
            "only decoders with plain attention in every layer",
        ),
        (transformers.Lfm2Config(**DECODER, num_hidden_layers=2, full_attn_idxs=[1]), "plain attention in every"),
        (transformers.MixtralConfig(**MIXTURE, num_local_experts=4), "no function for the operator .*grouped_mm"),
    ],
)
def test_decoders_that_cannot_be_exported_are_refused_with_a_way_out(config, message):
    with pytest.raises(InputError, match=rf"{message}.*prehab-export truncate"):
        check(config)


@pytest.mark.parametrize(
    ("config", "task", "samples"),
    [
        (transformers.LlamaConfig(**DECODER, num_hidden_layers=4), GENERATION, None),
        (transformers.MobileBertConfig(**SIZES, num_hidden_layers=4, embedding_size=16), TEXT, None),
        pytest.param(
            transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, pad_token_id=0),
            *(TEXT, None),
            marks=pytest.mark.slow,
        ),
        (
            transformers.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 4], num_heads=[2, 4]),
            *(IMAGE, pictures(32)),
        ),
    ],
)
def test_models_that_can_be_exported_pass(config, task, samples):
    check(config, task, samples)


def test_what_fails_before_any_export_is_no_refusal(monkeypatch):
    config = transformers.LlamaConfig(**DECODER, num_hidden_layers=1)
    monkeypatch.setattr(
        "prehab_export.deployment.exportability.check_exportable", lambda *a, **k: pytest.fail("was tried")
    )
    check(config, samples=Samples(np.arange(6), lambda rows: {"input_ids": torch.full((len(rows), 4), 10**6)}))
    monkeypatch.setattr("prehab_export.deployment.exportability.skeleton", lambda *a: None)
    check(config)


@pytest.mark.parametrize(
    ("config", "task", "counts"),
    [
        (transformers.LlamaConfig(**DECODER, num_hidden_layers=9), GENERATION, [1]),
        (transformers.Gemma3TextConfig(**DECODER, head_dim=8, num_hidden_layers=13), GENERATION, [2]),
        (
            transformers.JambaConfig(**{**MIXTURE, "num_hidden_layers": 8}, attn_layer_period=4, attn_layer_offset=2),
            *(GENERATION, [3]),
        ),
        (transformers.SwinConfig(depths=[2, 2, 6, 2], embed_dim=24, num_heads=[1, 2, 4, 8]), IMAGE, [4, 2, 2, 2, 2]),
        (
            transformers.BartConfig(
                d_model=32,
                encoder_layers=3,
                decoder_layers=5,
                vocab_size=64,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
            ),
            *(TEXT, [1, 1]),
        ),
    ],
)
def test_a_skeleton_has_one_block_of_every_kind_at_full_width(config, task, counts):
    whole = empty_model(config, task)
    model = skeleton(config, whole, lambda config: make_model(config, task))
    assert block_counts(model) == counts
    assert {type(module) for module in model.modules()} == {type(module) for module in whole.modules()}
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    assert shapes == {tuple(parameter.shape) for parameter in whole.parameters()}
    assert not any(parameter.any() for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


@pytest.fixture(scope="module")
def mamba_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "mamba"
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    save_folder(transformers.MambaForCausalLM(config), folder, word_tokenizer())
    return folder


def test_a_run_is_refused_before_calibration_and_leaves_no_options(mamba_folder, prose, tmp_path, capsys):
    output = tmp_path / "out"
    options = ["--task", "text-generation", "--data", prose, "--sequence-length", 16, *QUICK]
    options += ["--set", "bench.sequence_lengths=16"]
    assert invoke("run", mamba_folder, *options, "-o", output) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "key/value cache" in said
    assert "dt_proj" not in said
    assert not (output / "run.yaml").exists()
    assert not list(output.glob("stages/*"))
    assert invoke("calibrate", mamba_folder, *options, "-o", output, "--exclude", "*.dt_proj") == 0


def test_data_that_the_model_does_not_take_are_refused_with_what_it_says(reviews, tmp_path, capsys):
    """A BART looks for the end of the text, which this tokenizer never writes."""
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        eos_token_id=3,
        pad_token_id=0,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    save_folder(transformers.BartForSequenceClassification(config), tmp_path / "bart", word_tokenizer())
    options = ["--task", "text-classification", "--data", reviews, *QUICK, "-o", tmp_path / "out"]
    assert invoke("calibrate", tmp_path / "bart", *options) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "BartForSequenceClassification does not run on the data" in said
    assert "at least one <eos> token" in said
    assert "check that this tokenizer and config.json belong to the model" in said


def test_a_model_that_needs_other_inputs_is_told_what_it_was_given():
    part = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.Siglip2Config(vision_config=part, text_config=part, num_labels=3)
    model = transformers.Siglip2ForImageClassification(config).eval()
    with pytest.raises(InputError, match="Its inputs are pixel_values, from its image processor"):
        check_runs(model, IMAGE, pictures(32))


def test_only_a_first_export_is_tried(vit_folder, tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr("prehab_export.pipeline.running.check_export", tried.append)
    options = [vit_folder, "--task", "image-classification", "--data", "sklearn-digits", *QUICK, "-o", tmp_path / "out"]
    assert invoke("truncate", *options) == 0
    assert tried == []
    assert invoke("export", *options) == 0
    assert len(tried) == 1
    assert invoke("export", *options) == 0
    assert len(tried) == 1
