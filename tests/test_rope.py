"""Rotary frequencies that depend on a text's length: graphs against PyTorch, within and beyond the trained length."""

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from converters.onnx.export import export_onnx
from converters.onnx.generate import greedy_decode
from converters.onnx.rope import traceable_frequencies
from converters.onnx.runtime import open_session
from prehab_export.inputs.evaluation import feeds_of

TRAINED = 16
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.2,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LONG = {
    "rope_type": "longrope",
    "factor": 4.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": TRAINED,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}


def llama(rope, positions=TRAINED):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=1, max_position_embeddings=positions, rope_parameters=rope)
    return LlamaForCausalLM._from_config(config).eval()


def gemma3(rope):
    torch.manual_seed(0)
    layers = {"sliding_attention": PLAIN, "full_attention": rope}
    config = Gemma3TextConfig(
        **{**SIZES, "pad_token_id": 0},
        num_hidden_layers=2,
        head_dim=8,
        sliding_window=8,
        max_position_embeddings=TRAINED,
        layer_types=list(layers),
        rope_parameters=layers,
    )
    return Gemma3ForCausalLM._from_config(config).eval()


MODELS = {
    "dynamic": lambda: llama(DYNAMIC),
    "longrope": lambda: llama(LONG, 4 * TRAINED),
    "dynamic-by-layer": lambda: gemma3(DYNAMIC),
}


@pytest.mark.parametrize("kind", ["dynamic", "longrope", pytest.param("dynamic-by-layer", marks=pytest.mark.slow)])
def test_graphs_match_pytorch_beyond_the_trained_length(tmp_path, kind):
    session = open_session(export_onnx(MODELS[kind](), "text-generation", tmp_path / "model.onnx").path)
    for batch, length in ((1, 5), (2, TRAINED), (2, TRAINED + 1), (1, 3 * TRAINED)):
        ids = torch.randint(1, 50, (batch, length))
        with torch.no_grad():
            expected = MODELS[kind]()(input_ids=ids).logits.numpy()  # a new one: frequencies of longer texts stay
        actual = session.run(["logits"], feeds_of(session.get_inputs(), {"input_ids": ids}))[0]
        assert np.abs(actual - expected).max() < 5e-6 * np.abs(expected).max(), (batch, length)
    # Growing token by token over the border, each side with its own cache.
    prompt = torch.randint(1, 50, (1, TRAINED - 3))
    model, step, past, tokens = MODELS[kind](), prompt, None, []
    for _ in range(8):
        with torch.no_grad():
            output = model(input_ids=step, past_key_values=past, use_cache=True)
        step, past = output.logits[:, -1:].argmax(-1), output.past_key_values
        tokens.append(step)
    np.testing.assert_array_equal(greedy_decode(session, prompt.numpy(), 8)[:, -8:], torch.cat(tokens, 1).numpy())


def test_frequencies_without_branches_are_those_of_transformers_and_nothing_is_left_behind():
    for make, layer in ((MODELS["dynamic"], {}), (MODELS["dynamic-by-layer"], {"layer_type": "full_attention"})):
        for length in (4, TRAINED, TRAINED + 1, 100):
            rotary, states, positions = make().model.rotary_emb, torch.zeros(1, length, 32), torch.arange(length)[None]
            expected = make().model.rotary_emb(states, positions, **layer)
            before = {name: value.clone() for name, value in rotary.named_buffers()}
            with traceable_frequencies(rotary):
                actual = rotary(states, positions, **layer)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
            assert "forward" not in vars(rotary)
            assert all(torch.equal(value, before[name]) for name, value in rotary.named_buffers())
            assert rotary.max_seq_len_cached == TRAINED
