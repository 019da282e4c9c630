"""What a PEFT adapter's folder says of itself: its config and the names and shapes of its tensors.

Nothing here loads weights, PEFT or torch, so that an adapter can be refused before any slow work.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from converters.errors import InputError

ADAPTER_NAME = "default"  # under which PEFT is asked to load

_PREFIX = "base_model.model."
# What a LoRA config may ask for that a product of two factors added to a weight cannot hold.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens",
}
# Other starts (PiSSA, OLoRA, LoftQ, …) also change the base weights, which the adapter does not carry.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter's config and safetensors header say.

    Attributes:
        path: the adapter's folder.
        base_model: what it was trained on, as its config names it, or None.
        ranks: LoRA rank by layer name.
        replaced: full tensors beside the LoRA pairs (biases, a classifier head), by name.
    """

    path: Path
    base_model: str | None
    ranks: Mapping[str, int]
    replaced: tuple[str, ...]


def check_adapter(adapter: Path) -> AdapterInfo:
    """Read an adapter's config and tensor names; no weights are loaded.

    Raises:
        InputError: not a PEFT folder, not plain LoRA, weights in pickle, or a LoRA pair that is not one.
    """
    adapter = Path(adapter)
    config, shapes = _read_config(adapter), _tensor_shapes(adapter)
    ranks: dict[str, dict[str, int]] = {}
    replaced = []
    for name, shape in shapes.items():
        layer, _, kind = name.removeprefix(_PREFIX).rpartition(".lora_")
        side = kind.removeprefix("embedding_").removesuffix(".weight")
        if side in ("A", "B"):
            ranks.setdefault(layer, {})[side] = shape[0 if side == "A" else 1]
        elif kind != "B.bias" and not is_duplicate(name):
            replaced.append(plain_name(name))
    if not ranks:
        raise InputError(f"{adapter}: the weights hold no LoRA pair (lora_A, lora_B)")
    for layer, pair in ranks.items():
        if pair.get("A") != pair.get("B"):
            raise InputError(f"{adapter}: lora_A and lora_B of {layer} do not match")
    base = config.get("base_model_name_or_path")
    return AdapterInfo(adapter, base, {layer: pair["A"] for layer, pair in ranks.items()}, tuple(replaced))


def is_duplicate(key: str) -> bool:
    """With bias="all" PEFT also writes the biases inside its own wrapper of a replaced module."""
    return ".modules_to_save." in key or ".original_module." in key


def plain_name(key: str) -> str:
    """A tensor's name without what PEFT puts around it."""
    return key.replace(_PREFIX, "").replace(f".{ADAPTER_NAME}", "").replace(".base_layer", "")


def _read_config(adapter: Path) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise InputError(f"{adapter} is not a PEFT adapter: it has no adapter_config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: the adapter's type is {config.get('peft_type')}; only LORA can be merged")
    for option, title in _UNSUPPORTED.items():
        if config.get(option):
            raise InputError(f"{path}: {title} ({option}) cannot be merged into factors; only plain LoRA can")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise InputError(
            f"{path}: training started from changed base weights (init_lora_weights={start!r}); save the "
            "adapter again with PEFT's path_initial_model_for_weight_conversion"
        )
    return config


def _tensor_shapes(adapter: Path) -> dict[str, list[int]]:
    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        found = " (adapter_model.bin is pickle, which is not read)" if (adapter / "adapter_model.bin").exists() else ""
        raise InputError(f"{adapter} has no adapter_model.safetensors{found}: save the adapter as safetensors")
    try:
        with safe_open(path, framework="numpy") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error
