"""Write ``genai_config.json``, so that onnxruntime-genai can generate text from a folder without changes.

https://onnxruntime.ai/docs/genai/reference/config.html

onnxruntime-genai refuses a folder if one value has the wrong type or one id is outside the vocabulary. A transformers
config may omit any of them, give a list, or use another name. So sizes are taken from a run of the model, ids are
limited to its vocabulary, and the generation config contributes all values that both libraries understand.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from converters.model_config import attention_heads, context_length, hidden_size, tokens_named
from converters.onnx.cache import cache_layout

FILE_NAME = "genai_config.json"

# The context length of a model whose config does not state one.
_USUAL_CONTEXT = 2048
# How many of the likeliest tokens transformers samples from if a generation config does not say.
_USUAL_TOP_K = 50
# ``max_length`` in files of older releases, which wrote their default value; nobody chose it.
_UNCHOSEN_LENGTH = 20
_LARGEST_INT = 2**31 - 1


def write_genai_config(model: PreTrainedModel, folder: Path, graph: Path, inputs: tuple[str, ...]) -> bool:
    """Write the file for a decoder's graph into ``folder``. Returns False, and writes nothing, if onnxruntime-genai
    does not support the graph's cache.

    Args:
        graph: path of the graph, relative to the folder.
        inputs: names of the graph's inputs.
    """
    layout = cache_layout(model)
    shapes = set(layout.past.values())
    # onnxruntime-genai makes the empty cache itself, with one shape for the keys and values of all layers.
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
    end_ids = _ids(model, "eos_token_id", vocabulary)
    end = end_ids[0] if end_ids else 0
    names: dict[str, str] = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    names |= {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")}
    outputs = {"logits": "logits"} | {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")}
    return {
        "model": {
            "type": "decoder",
            "vocab_size": vocabulary,
            "context_length": length,
            "bos_token_id": _first(_ids(model, "bos_token_id", vocabulary), end),
            "eos_token_id": end_ids[0]
            if len(end_ids) == 1
            else end_ids,  # an empty list means that no token ends a text
            "pad_token_id": _first(_ids(model, "pad_token_id", vocabulary), end),
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
    """How to choose tokens: the settings of the generation config, limited to what onnxruntime-genai accepts."""

    def setting(name: str) -> Any:
        value = getattr(generation, name, None)
        return value if isinstance(value, int | float) else None

    # The graph returns a new, longer cache; it does not write into the one that it gets.
    search: dict[str, Any] = {"max_length": length, "do_sample": bool(setting("do_sample"))}
    search["past_present_share_buffer"] = False
    if (longest := setting("max_length")) is not None and longest > _UNCHOSEN_LENGTH:
        search["max_length"] = min(int(longest), length)
    if (least := setting("min_length")) is not None and least > 0:
        search["min_length"] = min(int(least), search["max_length"])
    temperature = setting("temperature")
    if temperature is not None and temperature > 0:
        search["temperature"] = temperature
    elif temperature is not None:
        search["do_sample"] = False  # the limit as the temperature approaches 0
    top_k = setting("top_k")
    if top_k is not None or search["do_sample"]:
        search["top_k"] = min(max(0, int(_USUAL_TOP_K if top_k is None else top_k)), vocabulary)  # 0: no limit
    top_p = setting("top_p")
    if top_p is not None and 0 < top_p <= 1:
        search["top_p"] = top_p
    penalty = setting("repetition_penalty")
    if penalty is not None and penalty > 0:
        search["repetition_penalty"] = penalty
    if (size := setting("no_repeat_ngram_size")) is not None and size > 0:
        search["no_repeat_ngram_size"] = int(size)
    if (beams := setting("num_beams")) is not None and beams > 1 and not search["do_sample"]:
        search["num_beams"] = int(beams)
        search["early_stopping"] = bool(getattr(generation, "early_stopping", None))
        if (exponent := setting("length_penalty")) is not None:
            search["length_penalty"] = exponent
    return search


def _vocabulary_size(model: PreTrainedModel) -> int:
    """The width of the logits; embedding tables may be padded beyond the size in the config."""
    with torch.no_grad():
        return int(model(input_ids=torch.ones(1, 2, dtype=torch.long, device=model.device)).logits.shape[-1])


def _ids(model: PreTrainedModel, name: str, vocabulary: int) -> list[int]:
    """The token ids under this name in the generation config, or else in the model's config. −1 and ids outside the
    vocabulary count as none."""
    for source in (model.generation_config, model.config):
        valid = [token for token in tokens_named(source, name) if 0 <= token < vocabulary]
        if valid:
            return list(dict.fromkeys(valid))
    return []


def _first(tokens: list[int], default: int) -> int:
    return tokens[0] if tokens else default
