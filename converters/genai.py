"""``genai_config.json``: what onnxruntime-genai must know to generate from a folder as it stands.

https://onnxruntime.ai/docs/genai/reference/config.html
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from converters.onnx.cache import cache_layout

FILE_NAME = "genai_config.json"


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
    (folder / FILE_NAME).write_text(
        json.dumps(_config(model, graph, inputs, heads, width), indent=2) + "\n", encoding="utf-8"
    )
    return True


def _config(model: PreTrainedModel, graph: Path, inputs: tuple[str, ...], heads: int, width: int) -> dict[str, Any]:
    config, generation = model.config.get_text_config(), model.generation_config
    end = _first(getattr(generation, "eos_token_id", None), config.eos_token_id)
    names: dict[str, str] = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    names |= {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")}
    outputs = {"logits": "logits"} | {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")}
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048
    return {
        "model": {
            "type": "decoder",
            "vocab_size": config.vocab_size,
            "context_length": length,
            "bos_token_id": _first(config.bos_token_id, end),
            "eos_token_id": end,
            "pad_token_id": _first(config.pad_token_id, end),
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": graph.as_posix(),
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": heads,
                "head_size": width,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": names,
                "outputs": outputs,
            },
        },
        # The graph returns a longer cache than it was given; it does not write into the one it has.
        "search": {"max_length": length, "do_sample": False, "past_present_share_buffer": False},
    }


def _first(*candidates: Any) -> Any:
    """The first that is given; of several end tokens all of them, as a list."""
    return next((candidate for candidate in candidates if candidate is not None), 0)
