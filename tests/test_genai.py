"""Every ``genai_config.json`` is loaded by the real onnxruntime-genai, and generates what PyTorch generates."""

import json
from pathlib import Path

import pytest
import torch
from small_models import SIZES, build
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from converters.genai import FILE_NAME, write_genai_config
from converters.onnx.export import export_onnx

genai = pytest.importorskip("onnxruntime_genai")

PROMPT = [5, 9, 12, 7]
GRAPH = Path("onnx", "model.onnx")
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
# Families that call their sizes by other names, or keep them elsewhere.
SLOW = ("bloom", "gpt-neo", "gemma3", "qwen3")
FAMILIES = {
    # 2 layers as n_layer, no bound on positions
    "bloom": lambda: (BloomForCausalLM, BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)),
    "gpt-neo": lambda: (
        GPTNeoForCausalLM,
        GPTNeoConfig(
            vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
        ),
    ),
    # heads wider than the model
    "qwen3": lambda: (Qwen3ForCausalLM, Qwen3Config(**SIZES, vocab_size=50, num_key_value_heads=2, head_dim=16)),
    # the text model is a part of a larger one
    "gemma3": lambda: (
        Gemma3ForConditionalGeneration,
        Gemma3Config(
            text_config=dict(SIZES, vocab_size=50, num_key_value_heads=2, head_dim=16),
            vision_config=dict(VISION, image_size=16, patch_size=4),
            mm_tokens_per_image=4,
            image_token_index=45,
            boi_token_index=46,
            eoi_token_index=47,
        ),
    ),
}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# (of the config, of the generation config) → (end tokens, the token to start with, the one to pad with)
ODD_IDS = {
    "several ends, nothing to pad with": ({"eos_token_id": [26, 3], "bos_token_id": 1}, {}, [26, 3], 1, 26),
    "the generation config has more ends": ({"eos_token_id": 3}, {"eos_token_id": [3, 27]}, [3, 27], 3, 3),
    "the generation config has none": ({"eos_token_id": 28}, None, [28], 28, 28),
    "no ids at all": ({}, {}, [], 0, 0),
    "minus one for none": (dict.fromkeys(IDS, -1), {"pad_token_id": -1}, [], 0, 0),
    "ids of another vocabulary": (dict.fromkeys(IDS, 50256), {"eos_token_id": [128001, 27]}, [27], 27, 27),
    "one end in a list": ({"eos_token_id": [27], "pad_token_id": 50}, {}, [27], 27, 27),
    "a list to start with": ({"eos_token_id": 3, "pad_token_id": 4}, {"bos_token_id": [2, 1]}, [3], 2, 4),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model, folder = build("llama"), tmp_path_factory.mktemp("llama")
    return model, folder, export_onnx(model, "text-generation", folder / GRAPH).inputs


def write(exported, generation=None, **config):
    """The written config of the LLaMA with these fields; the model is left with them, too."""
    model, folder, inputs = exported
    model.config = type(model.config)(**{**build("llama").config.to_dict(), **dict.fromkeys(IDS), **config})
    model.generation_config = None if generation is None else GenerationConfig(**generation)
    assert write_genai_config(model, folder, GRAPH, inputs)
    return json.loads((folder / FILE_NAME).read_text())


def generated(folder, length=None):
    """The tokens after the prompt; the one that ends them does not come back."""
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    if length is not None:
        parameters.set_search_options(max_length=length)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(PROMPT)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(PROMPT) :]


@torch.no_grad()
def greedy(model, ends, length):
    tokens = list(PROMPT)
    while len(tokens) < length:
        token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("case", ODD_IDS)
def test_ids_as_real_configs_have_them(exported, case):
    config, generation, ends, start, padding = ODD_IDS[case]
    written = write(exported, generation, **config)["model"]
    assert written["eos_token_id"] == (ends[0] if len(ends) == 1 else ends)
    assert (written["bos_token_id"], written["pad_token_id"]) == (start, padding)
    assert generated(exported[1], 12) == greedy(exported[0], ends, 12)


@pytest.mark.parametrize(
    ("config", "length"),
    [({"max_position_embeddings": 32}, 32), ({"max_position_embeddings": -1}, 2048), ({"vocab_size": 40}, 2048)],
)
def test_sizes_that_the_config_does_not_know(exported, config, length):
    """The logits are 50 wide, whatever the config says of its vocabulary."""
    written = write(exported, **config)["model"]
    assert (written["vocab_size"], written["context_length"]) == (50, length)
    assert generated(exported[1], 10) == greedy(exported[0], [], 10)


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in FAMILIES])
def test_families_that_name_their_sizes_otherwise(family, tmp_path):
    kind, config = FAMILIES[family]()
    torch.manual_seed(0)
    model = kind._from_config(config).eval()
    inputs = export_onnx(model, "text-generation", tmp_path / GRAPH).inputs
    assert write_genai_config(model, tmp_path, GRAPH, inputs)
    ends = json.loads((tmp_path / FILE_NAME).read_text())["model"]["eos_token_id"]
    assert generated(tmp_path, 10) == greedy(model, ends if isinstance(ends, list) else [ends], 10)


@pytest.mark.parametrize(
    ("generation", "search"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1},
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1},
        ),
        ({"do_sample": True}, {"do_sample": True, "top_k": 50}),  # transformers' own default
        ({"do_sample": True, "top_k": 1000}, {"do_sample": True, "top_k": 50}),  # more than there are tokens
        ({"do_sample": True, "top_k": 0, "top_p": 0.9}, {"do_sample": True, "top_k": 0, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.0}, {"do_sample": False}),
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": False, "temperature": 0.9, "top_p": 0.6}),
        ({"do_sample": True, "top_k": -1, "top_p": 1.5, "repetition_penalty": 0.0}, {"do_sample": True, "top_k": 0}),
        ({"max_length": 40, "min_length": 60}, {"do_sample": False, "max_length": 40, "min_length": 40}),
        ({"max_length": 10**6}, {"do_sample": False}),
        ({"max_length": 20, "max_new_tokens": 5}, {"do_sample": False}),
        (None, {"do_sample": False}),
    ],
)
def test_the_generation_config_is_taken_over(exported, generation, search):
    written = write(exported, generation, max_position_embeddings=64)["search"]
    assert written == {"max_length": 64, "past_present_share_buffer": False, **search}
    assert all(0 <= token < 50 for token in generated(exported[1], None if "min_length" in search else 12))


@pytest.mark.parametrize(
    "generation",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_length": 12, "eos_token_id": [26, 27, 45]},
        {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True, "eos_token_id": 49},
    ],
)
def test_what_is_taken_over_means_the_same(exported, generation):
    write(exported, {**generation, "max_length": 24})
    expected = exported[0].generate(torch.tensor([PROMPT]), max_length=24, pad_token_id=0)[0].tolist()
    ends = generation.get("eos_token_id", [])
    while expected[-1] in (ends if isinstance(ends, list) else [ends]):
        expected.pop()
    assert generated(exported[1]) == expected[len(PROMPT) :]
