"""``genai_config.json``: what onnxruntime-genai must know to generate from a folder as it stands.

https://onnxruntime.ai/docs/genai/reference/config.html

Its reader refuses a folder over one value of the wrong type, or one id outside the vocabulary; a config of transformers
may leave out, list or misname any of them. So sizes are those that the model shows when it runs, ids are those that its
vocabulary has, and of the generation config all is taken over that both sides understand.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from converters.model_config import attention_heads, context_length, hidden_size, tokens_named
from converters.onnx.cache import cache_layout

FILE_NAME = "genai_config.json"

# Where nothing tells how many tokens a model takes.
_USUAL_CONTEXT = 2048
# What transformers draws from where a generation config samples and does not say: the 50 likeliest tokens.
_USUAL_TOP_K = 50
# ``max_length`` in the files of older releases, which wrote their default; nobody's choice.
_UNCHOSEN_LENGTH = 20
_LARGEST_INT = 2**31 - 1


def write_genai_config(model: PreTrainedModel, folder: Path, graph: Path, inputs: tuple[str, ...]) -> bool:
    """Write the file for a decoder's graph in ``folder``; False, and no file, where the runtime knows no such cache.

    Args:
        graph: where the graph lies, relative to the folder.
        inputs: the graph's own.
    """
    layout = cache_layout(model)
    shapes = set(layout.past.values())
    # It makes the empty cache itself, keys and values of one shape for all layers.
    if len(shapes) != 1 or not set(layout.past) <= set(inputs):
        return False
    ((heads, width),) = shapes
    config = _config(model, graph, inputs, len(layout.past) // 2, heads, width)
    (folder / FILE_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return True


def _config(
    model: PreTrainedModel, graph: Path, inputs: tuple[str, ...], layers: int, heads: int, width: int
) -> dict[str, Any]:
    vocabulary = _vocabulary_size(model)
    length = min(context_length(model.config) or _USUAL_CONTEXT, _LARGEST_INT)
    ends = _ids(model, "eos_token_id", vocabulary)
    end = ends[0] if ends else 0
    names: dict[str, str] = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    names |= {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")}
    outputs = {"logits": "logits"} | {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")}
    return {
        "model": {
            "type": "decoder",
            "vocab_size": vocabulary,
            "context_length": length,
            "bos_token_id": _one(_ids(model, "bos_token_id", vocabulary), end),
            "eos_token_id": ends[0] if len(ends) == 1 else ends,  # an empty list ends nowhere
            "pad_token_id": _one(_ids(model, "pad_token_id", vocabulary), end),
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": graph.as_posix(),
                "hidden_size": hidden_size(model.config) or heads * width,
                "num_attention_heads": attention_heads(model.config) or heads,
                "num_key_value_heads": heads,
                "head_size": width,
                "num_hidden_layers": layers,
                "inputs": names,
                "outputs": outputs,
            },
        },
        "search": _search(model.generation_config, vocabulary, length),
    }


def _search(generation: GenerationConfig | None, vocabulary: int, length: int) -> dict[str, Any]:
    """How to pick tokens: what the generation config says, within what the runtime takes."""

    def given(name: str) -> Any:
        value = getattr(generation, name, None)
        return value if isinstance(value, int | float) else None

    # The graph returns a longer cache than it was given; it does not write into the one it has.
    search: dict[str, Any] = {"max_length": length, "do_sample": bool(given("do_sample"))}
    search["past_present_share_buffer"] = False
    if (longest := given("max_length")) is not None and longest > _UNCHOSEN_LENGTH:
        search["max_length"] = min(int(longest), length)
    if (least := given("min_length")) is not None and least > 0:
        search["min_length"] = min(int(least), search["max_length"])
    temperature = given("temperature")
    if temperature is not None and temperature > 0:
        search["temperature"] = temperature
    elif temperature is not None:
        search["do_sample"] = False  # the limit of ever lower temperatures
    kept = given("top_k")
    if kept is not None or search["do_sample"]:
        search["top_k"] = min(max(0, int(_USUAL_TOP_K if kept is None else kept)), vocabulary)  # 0: all of them
    share = given("top_p")
    if share is not None and 0 < share <= 1:
        search["top_p"] = share
    penalty = given("repetition_penalty")
    if penalty is not None and penalty > 0:
        search["repetition_penalty"] = penalty
    if (size := given("no_repeat_ngram_size")) is not None and size > 0:
        search["no_repeat_ngram_size"] = int(size)
    if (beams := given("num_beams")) is not None and beams > 1 and not search["do_sample"]:
        search["num_beams"] = int(beams)
        search["early_stopping"] = bool(getattr(generation, "early_stopping", None))
        if (exponent := given("length_penalty")) is not None:
            search["length_penalty"] = exponent
    return search


def _vocabulary_size(model: PreTrainedModel) -> int:
    """The width of the logits: tables are padded, and configs do not always know it."""
    with torch.no_grad():
        return int(model(input_ids=torch.ones(1, 2, dtype=torch.long, device=model.device)).logits.shape[-1])


def _ids(model: PreTrainedModel, name: str, vocabulary: int) -> list[int]:
    """The tokens that the generation config, else the model's config has under this name and the vocabulary knows;
    −1 and ids of other vocabularies stand for none."""
    for source in (model.generation_config, model.config):
        known = [token for token in tokens_named(source, name) if 0 <= token < vocabulary]
        if known:
            return list(dict.fromkeys(known))
    return []


def _one(tokens: list[int], otherwise: int) -> int:
    return tokens[0] if tokens else otherwise
