"""Loading and refusing models: small ones made here, saved, and damaged one way each."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DistilBertConfig,
    Gemma3Config,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    SegformerConfig,
    SegformerForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from converters.errors import InputError
from converters.folder import from_pretrained, save_folder
from converters.model_config import forget_kernels
from prehab_export.inputs.models import (
    check_task,
    empty_model,
    fingerprint,
    input_names,
    load_config,
    load_model,
    load_processor,
    longest_input,
    padding_id,
)
from prehab_export.inputs.tasks import TASKS
from prehab_export.pipeline.inspection import inspect_model

IMAGE, TEXT, GENERATION = TASKS["image-classification"], TASKS["text-classification"], TASKS["text-generation"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SHARED = Path(__file__).resolve().parents[2] / "shared"


def bert_config(**options):
    return BertConfig(**SMALL, vocab_size=60, max_position_embeddings=40, **{"num_labels": 3} | options)


@pytest.fixture(scope="module")
def saved_bert(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    BertForSequenceClassification(bert_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def bert(saved_bert, tmp_path):
    return Path(shutil.copytree(saved_bert, tmp_path / "model"))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_saved_model_comes_back_whole_in_evaluation_mode(bert):
    config = load_config(str(bert))
    check_task(config, TEXT)
    model = load_model(str(bert), TEXT)
    assert isinstance(model, BertForSequenceClassification)
    assert not model.training
    saved = load_file(bert / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items() if name in saved)


def test_the_empty_model_has_names_and_shapes_but_no_weights(bert):
    empty = empty_model(load_config(str(bert)), TEXT)
    loaded = load_model(str(bert), TEXT)
    shapes = {name: parameter.shape for name, parameter in loaded.named_parameters()}
    assert {name: parameter.shape for name, parameter in empty.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in empty.parameters())


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "../a", "a/b/c", "with space"])
def test_a_path_that_is_not_there_is_called_a_missing_folder(name):
    for read in (load_config, fingerprint, lambda n: load_model(n, TEXT), lambda n: load_processor(n, TEXT)):
        with pytest.raises(InputError, match="no such folder"):
            read(name)


def test_a_folder_without_a_config_and_a_file_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        load_config(str(tmp_path))
    file = tmp_path / "model.onnx"
    file.write_bytes(b"x")
    with pytest.raises(InputError, match="is a file"):
        load_config(str(file))


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "no-such-type"}'])
def test_a_broken_or_unknown_config_names_the_folder(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=rf"config\.json of {tmp_path}"):
        load_config(str(tmp_path))


def test_a_hub_model_out_of_reach_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for read in (load_config, fingerprint, lambda n: load_model(n, TEXT), lambda n: load_processor(n, TEXT)):
        with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
            read("nobody/has-this-model")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize(
    "asked",
    [
        *("flash_attention_2", "flash_attention_3", "flex_attention", "kernels-community/flash-attn3"),
        *("paged|flash_attention_2", "paged|eager", "no-such-attention", {"": "flash_attention_2"}),
    ],
)
def test_attention_that_needs_kernels_gives_way_to_that_of_pytorch(bert, tmp_path, capsys, key, asked):
    edit_config(bert, **{key: asked})
    model = load_model(str(bert), TEXT)
    assert model.config._attn_implementation == "sdpa"
    assert empty_model(load_config(str(bert)), TEXT).config._attn_implementation == "sdpa"
    model(input_ids=torch.tensor([[1, 2, 3]]))
    said = capsys.readouterr().err
    name = asked[""] if isinstance(asked, dict) else asked
    assert " ".join(said.split()).count(f"asks for {name}") == 1
    save_folder(model, tmp_path / "again")
    assert "attn_implementation" not in (tmp_path / "again" / "config.json").read_text()
    edit_config(tmp_path / "again", **{key: asked})
    assert from_pretrained(tmp_path / "again").config._attn_implementation == "sdpa"


def test_a_choice_of_pytorchs_own_attention_is_kept_where_the_family_has_it(bert, tmp_path, capsys):
    edit_config(bert, attn_implementation="eager")
    assert load_model(str(bert), TEXT).config._attn_implementation == "eager"
    config = MPNetConfig(**SMALL, vocab_size=60, num_labels=2)
    MPNetForSequenceClassification(config).save_pretrained(tmp_path / "mpnet")
    edit_config(tmp_path / "mpnet", attn_implementation="sdpa")  # which this family has not
    assert load_model(str(tmp_path / "mpnet"), TEXT).config._attn_implementation == "eager"
    assert "asks for" not in capsys.readouterr().err


def test_kernels_asked_for_by_a_part_of_a_model_are_forgotten_too():
    config = Gemma3Config()
    for part in (config.text_config, config.vision_config):
        part._attn_implementation_internal = "flash_attention_2"
    config.text_config._experts_implementation_internal = "sonicmoe"
    assert forget_kernels(config) == "flash_attention_2"
    assert forget_kernels(config) is None
    assert config.text_config._experts_implementation is None


def test_code_in_a_folder_does_not_run_unasked(bert):
    marker = bert / "ran"
    (bert / "configuration_own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import BertConfig\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
    )
    edit_config(bert, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    with pytest.raises(InputError, match="--trust-remote-code"):
        load_config(str(bert))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("config", "architecture", "task", "message"),
    [
        (bert_config(), BertForSequenceClassification, IMAGE, "it fits text-classification"),
        (bert_config(), BertModel, TEXT, "no head"),
        (bert_config(), BertForMaskedLM, TEXT, "no head"),
        (bert_config(), BertForMaskedLM, GENERATION, "no head"),
        (GPT2Config(), GPT2LMHeadModel, TEXT, "it fits text-generation"),
        (GPT2Config(), GPT2ForSequenceClassification, GENERATION, "it fits text-classification"),
        (ViTConfig(num_labels=3), ViTForImageClassification, GENERATION, "it fits image-classification"),
    ],
)
def test_the_wrong_task_is_told_from_the_config(config, architecture, task, message):
    config.architectures = [architecture.__name__]
    with pytest.raises(InputError, match=f"{architecture.__name__} is not a model for {task.name}; .*{message}"):
        check_task(config, task)


def test_models_of_other_families_pass_for_their_task():
    for config, architecture, task in (
        (DeiTConfig(num_labels=3), DeiTForImageClassificationWithTeacher, IMAGE),
        (LlamaConfig(num_labels=3), LlamaForSequenceClassification, TEXT),
        (GPT2Config(), GPT2LMHeadModel, GENERATION),
    ):
        config.architectures = [architecture.__name__]
        check_task(config, task)


@pytest.mark.parametrize("model_class", [DeiTForImageClassification, ViTForImageClassification])
def test_a_config_without_architectures_makes_the_model_that_the_task_names(tmp_path, model_class):
    """DeiT has two classes for the task, and transformers looks for theirs among the configuration's."""
    sizes = {**SMALL, "image_size": 8, "patch_size": 4}
    save_folder(model_class(model_class.config_class(**sizes, num_labels=3)), tmp_path)
    edit_config(tmp_path, architectures=None)
    config = load_config(str(tmp_path))
    check_task(config, IMAGE)
    assert type(empty_model(config, IMAGE)) is model_class
    assert type(load_model(str(tmp_path), IMAGE)) is model_class


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "multi_label_classification"),
        ({"problem_type": "regression"}, "regression"),
        ({"num_labels": 1}, "regression"),
    ],
)
def test_regression_and_multi_label_heads_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        check_task(bert_config(**options), TEXT)


def test_a_quantised_model_is_refused():
    config = bert_config()
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(InputError, match=r"already compressed \(gptq\)"):
        check_task(config, TEXT)


def test_missing_weights_are_named(bert):
    edit_weights(bert, lambda tensors: tensors.pop("classifier.weight"))
    with pytest.raises(InputError, match=r"lacks weights: classifier\.weight"):
        load_model(str(bert), TEXT)


def test_weights_of_another_shape_are_named(bert):
    edit_config(bert, intermediate_size=48)
    with pytest.raises(InputError, match=r"bert\.encoder\.layer\.0\.intermediate\.dense\.bias \(64,\) for \(48,\)"):
        load_model(str(bert), TEXT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bert, value):
    def spoil(tensors):
        tensors["classifier.weight"][1, 2] = value

    edit_weights(bert, spoil)
    with pytest.raises(InputError, match=r"classifier\.weight of .* NaN or Inf"):
        load_model(str(bert), TEXT)


def test_pickled_and_absent_weights_are_refused(bert):
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pytorch_model\.bin, a pickle"):
        load_model(str(bert), TEXT)
    (bert / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="no weights"):
        load_model(str(bert), TEXT)


def test_a_cut_weights_file_is_refused(bert):
    path = bert / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="is damaged or cut short"):
        load_model(str(bert), TEXT)


def test_a_classifier_on_a_decoder_gets_a_padding_token(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, vocab_size=60, num_labels=3, eos_token_id=7)
    assert config.pad_token_id is None
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), TEXT)
    assert model.config.pad_token_id == padding_id(load_config(str(tmp_path))) == 7
    short, padded = torch.tensor([[3, 4, 5]]), torch.tensor([[3, 4, 5, 7, 7]])
    alone = model(input_ids=short).logits
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    assert torch.allclose(model(input_ids=padded, attention_mask=mask).logits, alone, atol=1e-6)


@pytest.mark.parametrize(
    ("pad", "eos", "expected"),
    [(5, 7, 5), (None, 7, 7), (-1, [8, 9], 8), (None, None, 0), (0, 3, 0), (None, 50256, 0)],
)
def test_padding_falls_back_to_the_end_of_text_and_then_to_zero(pad, eos, expected):
    assert padding_id(LlamaConfig(**SMALL, vocab_size=60, pad_token_id=pad, eos_token_id=eos)) == expected


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (
            MobileBertForSequenceClassification,
            MobileBertConfig(**SMALL, vocab_size=60, embedding_size=16, true_hidden_size=16, intra_bottleneck_size=16),
        ),
        (
            SegformerForImageClassification,  # whose config has no image size
            SegformerConfig(
                num_encoder_blocks=2,
                depths=[1, 1],
                sr_ratios=[2, 1],
                hidden_sizes=[8, 16],
                num_attention_heads=[1, 2],
                patch_sizes=[7, 3],
                strides=[4, 2],
                mlp_ratios=[2, 2],
            ),
        ),
    ],
)
def test_families_that_lack_fields_can_be_inspected(tmp_path, model_class, config):
    model_class(config).save_pretrained(tmp_path)
    assert any(row["selected"] for row in inspect_model(str(tmp_path))["layers"])


def test_a_family_without_an_end_of_text_is_padded_with_its_own_token():
    assert padding_id(MobileBertConfig(pad_token_id=3)) == 3


def test_token_types_are_inputs_of_models_that_tell_them_apart():
    assert "token_type_ids" not in input_names(GPT2Config(n_layer=1, num_labels=2), TEXT)
    assert "token_type_ids" not in input_names(RobertaConfig(**SMALL, type_vocab_size=1), TEXT)


def test_the_longest_input_counts_usable_positions():
    roberta = RobertaConfig(**SMALL, max_position_embeddings=42, pad_token_id=1, num_labels=2)
    limit = longest_input(roberta, TEXT)
    assert limit == 40
    model = AutoModelForSequenceClassification.from_config(roberta).eval()
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))
    assert longest_input(bert_config(), TEXT) == 40
    assert longest_input(GPT2Config(n_positions=64, n_layer=1), GENERATION) == 64


def test_a_models_inputs_come_from_its_forward_pass():
    assert "token_type_ids" in input_names(bert_config(), TEXT)
    assert "token_type_ids" not in input_names(DistilBertConfig(num_labels=2), TEXT)
    assert "pixel_values" in input_names(DeiTConfig(num_labels=2), IMAGE)


def test_an_image_processor_works_from_pillow_alone(tmp_path):
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no config\.json"):
        load_processor(str(tmp_path), IMAGE)
    ViTConfig(image_size=16).save_pretrained(tmp_path)
    assert type(load_processor(str(tmp_path), IMAGE)).__name__ == "ViTImageProcessorPil"


def test_a_missing_processor_is_refused(bert):
    with pytest.raises(InputError, match="no tokenizer files"):
        load_processor(str(bert), TEXT)
    with pytest.raises(InputError, match="image processor"):
        load_processor(str(bert), IMAGE)
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(bert)
    assert load_processor(str(bert), TEXT)("b a").input_ids == [2, 1]


def test_the_fingerprint_follows_content_and_not_place_or_time(bert, tmp_path):
    first = fingerprint(str(bert))
    copy = shutil.copytree(bert, tmp_path / "elsewhere")
    (copy / "README.md").write_text("notes")
    assert fingerprint(str(copy)) == first
    edit_weights(copy, lambda tensors: tensors["classifier.bias"].add_(1))
    assert fingerprint(str(copy)) != first
    edit_config(bert, hidden_dropout_prob=0.3)
    assert fingerprint(str(bert)) != first


@pytest.mark.parametrize("name", ["tokenizer.json", "bpe.codes", "qwen.tiktoken", "source.spm", "chat_template.jinja"])
def test_the_fingerprint_knows_the_vocabulary(name, bert):
    first = fingerprint(str(bert))
    (bert / name).write_text("another vocabulary")
    assert fingerprint(str(bert)) != first


def test_the_shared_models_load():
    if not SHARED.is_dir():
        pytest.skip("the shared models are not here")
    for name, task in (("vit-cifar10", IMAGE), ("llama-wiki", GENERATION)):
        folder = str(SHARED / "models" / name)
        check_task(load_config(folder), task)
        assert not load_model(folder, task).training
        load_processor(folder, task)
