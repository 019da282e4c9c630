"""Hugging Face folders of factored models: write and read.

``config.json`` carries the ranks by layer name, the weights file holds ``….down.weight``, ``….up.weight``
and ``….up.bias``, and everything else under its usual name. Layers that share one ``down`` are listed in
``config.json`` too, and the tensor stands under the first one's name. A model without compressed layers is written as
a plain Hugging Face folder. `register_auto_model` lets transformers' own ``from_pretrained`` read such
folders; a process that did not call it gets an error, see `converters.registration`. A folder re-written by
``model.save_pretrained`` loads as exactly, but transformers drops that safeguard: publish with `save_folder`.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from converters.dtypes import loaded_dtypes, main_dtype, name_of
from converters.errors import InputError
from converters.lowrank import LowRankLinear
from converters.model_config import architecture, code_references, compression, forget_kernels, untie_embeddings
from converters.publishing import published_folder
from converters.registration import (
    GUARD,
    QUANT_METHOD,
    LowRankConfig,
    module_places,
    other_names,
    ranks_of,
    register_auto_model,
    shared_of,
    without_guard,
)

__all__ = ["from_pretrained", "register_auto_model", "save_folder"]


def save_folder(model: PreTrainedModel, folder: Path, processor: Any = None, max_shard_size: int | str = "5GB") -> None:
    """Write a model, factored or dense, and its tokenizer or image processor as a Hugging Face folder.

    The folder appears complete or not at all, its bytes depend on the model only, and the model is left as
    it was. Weights are written as they are, in safetensors, tied weights once, in shards of at most
    ``max_shard_size``; `converters.dtypes.cast_weights` rounds them to a smaller dtype before.

    Raises:
        InputError: the folder exists and is not empty, or the model has an unmerged adapter, a foreign
            quantisation, parameters of several dtypes that loading would not keep apart, or one module in two places
            that its architecture keeps apart.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: name a new folder, or remove it first")
    config = _config_to_save(model)
    with published_folder(folder) as partial, _swapped_config(model, config), _names_declared(model):
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        _finish_config(partial / "config.json", name_of(main_dtype(model)), guarded=bool(ranks_of(model)))
        if processor is not None:
            processor.save_pretrained(partial)
        for weights in partial.glob("*.safetensors"):  # written for their owner alone; a folder is for all who may read
            weights.chmod((partial / "config.json").stat().st_mode)


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
    model_class: Any = _model_class(config, folder, trust_remote_code)
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
    _check_complete(folder, model, info)
    return model


def _config_to_save(model: PreTrainedModel) -> PreTrainedConfig:
    _check_saveable(model)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if ranks := ranks_of(model):
        config.quantization_config = LowRankConfig(ranks=dict(sorted(ranks.items())), shared=shared_of(model))
    if isinstance(model.get_output_embeddings(), LowRankLinear):
        untie_embeddings(config)  # a factored head shares nothing with the embedding
    return config


def _check_saveable(model: PreTrainedModel) -> None:
    entry = compression(model.config)
    if entry is not None and entry.get("quant_method") != QUANT_METHOD:
        raise InputError(f"the model is quantised ({entry.get('quant_method')}): dequantise it first")
    if getattr(model, "peft_config", None):
        raise InputError("the model carries an adapter: merge it first, see converters.adapters")
    _check_names(model)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(dtypes) > 1:
        main, state = main_dtype(model), model.state_dict()
        # Loading casts every tensor to one dtype, but for those that the architecture keeps in float32.
        wrong = [name for name, due in loaded_dtypes(model, main).items() if state[name].dtype != due]
        if wrong:
            raise InputError(
                f"the model has parameters in {', '.join(sorted(map(str, dtypes)))}, and loading would cast {wrong[0]} "
                f"to another dtype: do so first with converters.dtypes.cast_weights(model, {main})"
            )


def _check_names(model: PreTrainedModel) -> None:
    """What is one module here has to be one when the architecture is built again."""
    places = module_places(model)
    if not places:
        return
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    modules = dict(fresh.named_modules(remove_duplicate=False))
    for name, first in places.items():
        # The factors of a layer are none of the architecture's modules; the layer is.
        if name in modules and first in modules and modules[name] is not modules[first]:
            raise InputError(
                f"{first} and {name} are one module in this model and two in its architecture, so the folder would not "
                "load as what was saved: give one of them a copy (copy.deepcopy) first"
            )


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
def _names_declared(model: PreTrainedModel) -> Iterator[None]:
    """save_pretrained writes a tensor with several names once if it is told that they are names of one."""
    declared = model._tied_weights_keys
    if others := other_names(model):
        # An attribute of this model, in front of its class's.
        model._tied_weights_keys = {**dict(declared or {}), **{f"^{re.escape(key)}$": at for key, at in others.items()}}
    try:
        yield
    finally:
        if others:
            model._tied_weights_keys = declared


def _finish_config(path: Path, dtype: str, guarded: bool) -> None:
    config = _without_paths(json.loads(path.read_text(encoding="utf-8")))
    # transformers writes the dtype of the first parameter, which may be one of the few that stay in float32.
    for part in (config, *(value for value in config.values() if isinstance(value, dict) and "dtype" in value)):
        part["dtype"] = dtype
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
    entry = compression(config)
    if entry is not None:
        _check_entry(path, entry)
    forget_kernels(config)
    return without_guard(config)


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
    name = architecture(config)
    if name is None:
        raise InputError(f"{folder}/config.json names no architectures: cannot tell which class to build")
    references = code_references(config).values()
    custom = {ref.rpartition(".")[2]: ref for ref in references if isinstance(ref, str)}
    if name in custom and trust_remote_code:
        return get_class_from_dynamic_module(custom[name], folder)
    if not hasattr(transformers, name):
        hint = "pass trust_remote_code=True" if name in custom else "upgrade transformers"
        raise InputError(f"{folder}/config.json: the architecture {name} is not in transformers: {hint}")
    return getattr(transformers, name)


def _check_complete(folder: Path, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    # What has several names is in the file under the first.
    others = other_names(model)
    missing = {name for name in info["missing_keys"] if others.get(name, name) in info["missing_keys"]}
    problems = [f"missing: {name}" for name in sorted(missing)]
    problems += [f"unexpected: {name}" for name in sorted(info["unexpected_keys"])]
    problems += [
        f"wrong shape: {name} is {tuple(found)}, the config asks for {tuple(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    problems += [str(message) for message in info.get("error_msgs", [])]
    if problems:
        shown = "; ".join(problems[:5]) + ("; …" if len(problems) > 5 else "")
        raise InputError(f"{folder}: weights do not fit config.json ({len(problems)} problems): {shown}")
