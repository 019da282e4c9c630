"""Hugging Face folders of factored models: write, read, and let transformers' Auto classes read them.

``config.json`` carries the ranks by layer name as a ``quantization_config``, the place that transformers
offers for layers that are not what the architecture says; the weights file holds ``….down.weight``,
``….up.weight`` and ``….up.bias``, and everything else under its usual name. A model without compressed
layers is written as a plain Hugging Face folder.

transformers only *warns* about a ``quant_method`` that nobody registered and then returns random weights.
So ``config.json`` also names an impossible ``transformers_weights`` file, which transformers checks before
it reads any weight: a process that did not call `register_auto_model` gets a ValueError that tells it to.
Tools that only read ``model_type`` are not disturbed. ``model.save_pretrained`` drops that entry (as it does
for every model); publish with `save_folder`.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from converters.errors import InputError
from converters.lowrank import LowRankLinear, factorize_empty, low_rank_layers

QUANT_METHOD = "prehab_lowrank"
FORMAT_VERSION = 1
GUARD = (
    "none, these are low-rank factors: load with converters.folder.from_pretrained, "
    "or call converters.folder.register_auto_model() first (pip install prehab-export)"
)


@dataclass
class LowRankConfig(QuantizationConfigMixin):
    """The ``quantization_config`` entry of ``config.json``: the rank of every compressed layer, by name."""

    ranks: dict[str, int] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    quant_method: str = QUANT_METHOD

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise InputError(
                f"low-rank format version {self.format_version} is unknown, this release reads "
                f"version {FORMAT_VERSION}: upgrade prehab-export"
            )
        for name, rank in self.ranks.items():
            if type(rank) is not int or rank < 1:
                raise InputError(f"config.json: the rank of {name} is {rank!r}, not a positive integer")


class LowRankQuantizer(HfQuantizer):
    """Puts empty factors where the dense layers stood, while the model is still on the meta device."""

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        # The one hook that sees the model's config before its weights file is looked up.
        if getattr(config, "transformers_weights", None) == GUARD:
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        return factorize_empty(model, _names_within(model, self.quantization_config.ranks))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model.is_quantized = False  # factors are ordinary floats: allow .half(), .float() and training
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        # Called by save_pretrained before it writes the config: ranks may have changed since loading.
        self.quantization_config.ranks = ranks_of(model)
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register_auto_model() -> None:
    """Let ``AutoModelFor….from_pretrained`` (and every concrete class) read folders of factored models.

    Changes transformers' tables for this process; calling it again does nothing.
    """
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(LowRankConfig)
        register_quantizer(QUANT_METHOD)(LowRankQuantizer)


def ranks_of(model: nn.Module) -> dict[str, int]:
    """The rank of every two-factor linear, by layer name."""
    return {name: layer.rank for name, layer in low_rank_layers(model).items()}


def save_folder(
    model: PreTrainedModel, folder: Path, processor: Any = None, max_shard_size: int | str = "5GB"
) -> None:
    """Write a model, factored or dense, and its tokenizer or image processor as a Hugging Face folder.

    The folder appears complete or not at all, its bytes depend on the model only, and the model is left as
    it was. Weights are written as they are, in safetensors, tied weights once, in shards of at most
    ``max_shard_size``.

    Raises:
        InputError: the folder exists and is not empty, or the model has unmerged adapters, a foreign
            quantisation, or a compressed layer that its architecture ties to another.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: name a new folder, or remove it first")
    config = _config_to_save(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _published(folder) as partial, _swapped_config(model, config):
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        _finish_config(partial / "config.json", guarded=bool(ranks_of(model)))
        if processor is not None:
            processor.save_pretrained(partial)


def from_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model folder, factored or dense, as the class that its ``config.json`` names, in eval mode.

    Every tensor must be accounted for. The dense weights of compressed layers are never allocated.
    Registers the format with transformers on the way, see `register_auto_model`.

    Args:
        path: a local folder.
        dtype: of the parameters; by default the dtype they were saved in.
        device: where to load; by default the CPU.
        trust_remote_code: allow model code that lies in the folder.

    Raises:
        InputError: no such folder, another format or format version, an unknown architecture, no
            safetensors file, or tensors that are missing, unexpected or of the wrong shape.
    """
    register_auto_model()
    folder = Path(path)
    config = _read_config(folder, trust_remote_code)
    model_class = _model_class(config, folder, trust_remote_code)
    try:
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            device_map=None if device is None else {"": device},
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # collected below, with the names
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except InputError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot load {model_class.__name__}: {error}") from error
    _check_complete(folder, info)
    return model


def _config_to_save(model: PreTrainedModel) -> PreTrainedConfig:
    ranks = ranks_of(model)
    config = copy.deepcopy(model.config)
    existing = getattr(config, "quantization_config", None)
    method = existing.get("quant_method") if isinstance(existing, Mapping) else _method(existing)
    if method not in (None, QUANT_METHOD):
        raise InputError(f"the model is quantised ({method}): save it before quantisation, or dequantise it")
    if getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "peft_config", None):
        raise InputError("the model carries an adapter: merge it before saving (converters.adapters)")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if ranks:
        config.quantization_config = LowRankConfig(ranks=dict(sorted(ranks.items())))
    if isinstance(model.get_output_embeddings(), LowRankLinear):
        config.tie_word_embeddings = False  # a factored head shares nothing with the embedding
    return config


def _method(quantization_config: Any) -> str | None:
    return getattr(quantization_config, "quant_method", None)


@contextmanager
def _swapped_config(model: PreTrainedModel, config: PreTrainedConfig) -> Iterator[None]:
    """save_pretrained writes into the config that it saves: give it another one."""
    original = model.config
    model.config = config
    try:
        yield
    finally:
        model.config = original


@contextmanager
def _published(folder: Path) -> Iterator[Path]:
    """A sibling folder to write into, renamed to ``folder`` if the block succeeds, removed if it does not."""
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _finish_config(path: Path, guarded: bool) -> None:
    config = _without_paths(json.loads(path.read_text(encoding="utf-8")))
    if guarded:
        config["transformers_weights"] = GUARD
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _without_paths(value: Any) -> Any:
    """Nested configs keep where they were loaded from; that is this machine's business."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items() if key != "_name_or_path"}
    return [_without_paths(item) for item in value] if isinstance(value, list) else value


def _read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: {error}") from error
    entry = getattr(config, "quantization_config", None)
    if entry is not None:
        _check_entry(path, entry)
    if getattr(config, "transformers_weights", None) == GUARD:
        del config.transformers_weights
    return config


def _check_entry(path: Path, entry: dict[str, Any]) -> None:
    if entry.get("quant_method") != QUANT_METHOD:
        raise InputError(
            f"{path}: quantised with {entry.get('quant_method')!r}, not a folder of low-rank factors "
            f"({QUANT_METHOD!r}): load it with transformers"
        )
    try:
        LowRankConfig(**entry)
    except (TypeError, AttributeError) as error:
        raise InputError(f"{path}: the quantization_config is malformed: {error}") from error


def _model_class(config: PreTrainedConfig, folder: Path, trust_remote_code: bool) -> type[PreTrainedModel]:
    if not config.architectures:
        raise InputError(f"{folder}/config.json names no architectures: cannot tell which class to build")
    name = config.architectures[0]
    custom = {ref.rpartition(".")[2]: ref for ref in (getattr(config, "auto_map", None) or {}).values()}
    if name in custom and trust_remote_code:
        return get_class_from_dynamic_module(custom[name], folder)
    if not hasattr(transformers, name):
        hint = "pass trust_remote_code=True" if name in custom else "upgrade transformers"
        raise InputError(f"{folder}/config.json: the architecture {name} is not in transformers: {hint}")
    return getattr(transformers, name)


def _names_within(model: PreTrainedModel, ranks: Mapping[str, int]) -> dict[str, int]:
    """Layer names as this model has them: a task model's folder read as the bare model lacks the prefix
    and the head; a bare model's folder read as a task model gains the prefix."""
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model:
        saved_with_head = any(name.startswith(prefix) for name in ranks)
        inner = {name: rank for name, rank in ranks.items() if name.startswith(prefix) or not saved_with_head}
        return {name.removeprefix(prefix): rank for name, rank in inner.items()}
    known = dict(model.named_modules())
    return {name if name in known else prefix + name: rank for name, rank in ranks.items()}


def _check_complete(folder: Path, info: Mapping[str, Any]) -> None:
    problems = [f"missing: {name}" for name in sorted(info["missing_keys"])]
    problems += [f"unexpected: {name}" for name in sorted(info["unexpected_keys"])]
    problems += [
        f"wrong shape: {name} is {tuple(found)}, the config asks for {tuple(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    problems += [str(message) for message in info.get("error_msgs", [])]
    if problems:
        shown = "; ".join(problems[:5]) + ("; …" if len(problems) > 5 else "")
        raise InputError(f"{folder}: weights do not fit config.json ({len(problems)} problems): {shown}")
