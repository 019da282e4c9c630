"""Read a PEFT adapter's config and the names and shapes of its tensors.

Nothing here loads weights, PEFT or torch, so an unusable adapter is refused before any slow work.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from converters.errors import InputError

ADAPTER_NAME = "default"  # the name under which PEFT loads the adapter

_PREFIX = "base_model.model."
# PEFT's methods that cannot be expressed as a change of weights, and why.
_INPUTS, _MIXTURE = "it works by adding to the model's inputs", "it mixes adapters depending on the input"
_NOT_WEIGHTS = {
    "PROMPT_TUNING": _INPUTS,
    "MULTITASK_PROMPT_TUNING": _INPUTS,
    "P_TUNING": _INPUTS,
    "PREFIX_TUNING": _INPUTS,
    "CARTRIDGE": _INPUTS,
    "CPT": _INPUTS,
    "ADAPTION_PROMPT": _INPUTS,
    "XLORA": _MIXTURE,
    "POLY": _MIXTURE,
}
# Options of a LoRA config that no merged model of the same shape can express.
_NEVER_MERGED = {"alora_invocation_tokens": "activated LoRA", "layer_replication": "layer replication"}
# Options that a product of two factors added to a weight cannot express.
_NOT_PLAIN = {
    "use_dora": "DoRA",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens",
}
# Other initialisations (PiSSA, OLoRA, LoftQ, …) also change the base weights, which the adapter does not contain.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterInfo:
    """The contents of an adapter's config and safetensors header.

    Attributes:
        path: the adapter's folder.
        base_model: the model that it was trained on, as named in its config, or None.
        method: PEFT's name of the method, such as LORA.
        not_plain: why it is not plain LoRA, in words; None for plain LoRA.
        ranks: LoRA rank by layer name; empty for other methods.
        replaced: names of the full tensors beside the LoRA pairs (biases, a classifier head); for other methods, of all
            tensors.
    """

    path: Path
    base_model: str | None
    method: str
    not_plain: str | None
    ranks: Mapping[str, int]
    replaced: tuple[str, ...]


def check_adapter(adapter: Path) -> AdapterInfo:
    """Read an adapter's config and tensor names; no weights are loaded.

    Raises:
        InputError: not a PEFT folder, a method that cannot be merged into weights, weights in a pickle, or a LoRA pair
            whose halves do not match.
    """
    adapter = Path(adapter)
    config, shapes = _read_config(adapter), _tensor_shapes(adapter)
    base, method, not_plain = config.get("base_model_name_or_path"), config["peft_type"], _not_plain(config)
    if method != "LORA":
        return AdapterInfo(adapter, base, method, not_plain, {}, tuple(plain_name(name) for name in shapes))
    ranks: dict[str, dict[str, int]] = {}
    replaced = []
    for name, shape in shapes.items():
        layer, _, kind = name.removeprefix(_PREFIX).rpartition(".lora_")
        side = kind.removeprefix("embedding_").removesuffix(".weight")
        if side in ("A", "B"):
            ranks.setdefault(layer, {})[side] = shape[0 if side == "A" else 1]
        elif kind != "B.bias" and not is_duplicate(name):
            replaced.append(plain_name(name))
    if not ranks and not_plain is None:
        raise InputError(f"{adapter}: the weights hold no LoRA pair (lora_A, lora_B)")
    for layer, pair in ranks.items():
        if pair.get("A") != pair.get("B"):
            raise InputError(f"{adapter}: lora_A and lora_B of {layer} do not match")
    layer_ranks = {layer: pair["A"] for layer, pair in ranks.items()}
    return AdapterInfo(adapter, base, method, not_plain, layer_ranks, tuple(replaced))


def _not_plain(config: Mapping[str, Any]) -> str | None:
    """Why the adapter is not plain LoRA, in words; None if it is."""
    if config["peft_type"] != "LORA":
        return str(config["peft_type"])
    return next((f"{title} ({option})" for option, title in _NOT_PLAIN.items() if config.get(option)), None)


def is_duplicate(key: str) -> bool:
    """Whether a tensor is a second copy: with bias="all", PEFT also writes the biases inside its wrapper of a replaced
    module."""
    return ".modules_to_save." in key or ".original_module." in key


def plain_name(key: str) -> str:
    """Return a tensor's name without the parts that PEFT adds."""
    return key.replace(_PREFIX, "").replace(f".{ADAPTER_NAME}", "").replace(".base_layer", "")


def _read_config(adapter: Path) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise InputError(f"{adapter} is not a PEFT adapter: it has no adapter_config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    method = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(method, str):
        raise InputError(f"{path} names no peft_type: it is not the config of a PEFT adapter")
    if reason := _NOT_WEIGHTS.get(method):
        raise InputError(f"{path}: {method} cannot be merged into weights, since {reason}")
    for option, title in _NEVER_MERGED.items():
        if config.get(option):
            raise InputError(f"{path}: {title} ({option}) cannot be merged into the weights of the same model")
    if method != "LORA":
        return config
    initialisation = config.get("init_lora_weights")
    if initialisation not in _PLAIN_INITIALISATIONS:
        raise InputError(
            f"{path}: training started from changed base weights (init_lora_weights={initialisation!r}); save the "
            "adapter again with PEFT's path_initial_model_for_weight_conversion"
        )
    return config


def _tensor_shapes(adapter: Path) -> dict[str, list[int]]:
    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        has_pickle = (adapter / "adapter_model.bin").exists()
        hint = " (adapter_model.bin is a pickle, which is not read)" if has_pickle else ""
        raise InputError(f"{adapter} has no adapter_model.safetensors{hint}: save the adapter as safetensors")
    try:
        with safe_open(path, framework="numpy") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error
