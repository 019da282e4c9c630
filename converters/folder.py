"""Write and read Hugging Face folders of factored models.

``config.json`` holds the ranks by layer name. The weights file holds ``….down.weight``, ``….up.weight`` and
``….up.bias``, and everything else under its usual name. Layers that share one ``down`` are also listed in
``config.json``, and the tensor is stored under the name of the first. A model without compressed layers is written as a
plain Hugging Face folder. `register_auto_model` lets transformers' own ``from_pretrained`` read such folders; without
it, a process gets an error (see `converters.registration`). A folder written by ``model.save_pretrained`` also loads
exactly, but it lacks this safeguard: publish with `save_folder`.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
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


def save_folder(
    model: PreTrainedModel,
    folder: Path,
    processor: Any = None,
    max_shard_size: int | str = "5GB",
    *,
    widens: bool = False,
) -> None:
    """Write a model, factored or dense, and its tokenizer or image processor as a Hugging Face folder.

    The folder appears complete or not at all, its bytes depend only on the model, and the model does not change.
    Weights are written without conversion, as safetensors in shards of at most ``max_shard_size``; tied weights are
    written once. To round weights to a smaller dtype, call `converters.dtypes.cast_weights` first.

    Args:
        widens: if parameters have several dtypes, let loading convert them to the widest.

    Raises:
        InputError: the folder exists and is not empty, or the model has an unmerged adapter, a foreign quantisation,
            parameters of several dtypes that would not survive loading, or one module in two places that are two
            modules in its architecture.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: name a new folder, or remove it first")
    dtype = _loading_dtype(model, widens=widens)
    config = _config_to_save(model)
    with published_folder(folder) as partial, _swapped_config(model, config), _names_declared(model):
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        _finish_config(partial / "config.json", name_of(dtype), guarded=bool(ranks_of(model)))
        if processor is not None:
            processor.save_pretrained(partial)
        # Only their owner may read the weights as safetensors writes them; allow all who may read the config.
        for weights in partial.glob("*.safetensors"):
            weights.chmod((partial / "config.json").stat().st_mode)


def from_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model folder, factored or dense, as the class named in its ``config.json``, in eval mode.

    Missing or unexpected tensors are errors. The dense weights of compressed layers are never allocated. This also
    registers the format with transformers (see `register_auto_model`).

    Args:
        path: a local folder.
        dtype: dtype of the parameters; by default the one that they were saved in.
        device: device to load to; by default the CPU.
        trust_remote_code: allow model code in the folder to run.

    Raises:
        InputError: no such folder, another format or format version, an unknown architecture, no safetensors file, or
            tensors that are missing, unexpected or of the wrong shape.
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
            ignore_mismatched_sizes=True,  # reported below, with names
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
    """A copy of the config with the current ranks, after checking that the model can be saved."""
    _check_saveable(model)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if ranks := ranks_of(model):
        config.quantization_config = LowRankConfig(ranks=dict(sorted(ranks.items())), shared=shared_of(model))
    if isinstance(model.get_output_embeddings(), LowRankLinear):
        untie_embeddings(config)  # a factored output layer does not use the embedding table
    return config


def _check_saveable(model: PreTrainedModel) -> None:
    entry = compression(model.config)
    if entry is not None and entry.get("quant_method") != QUANT_METHOD:
        raise InputError(f"the model is quantised ({entry.get('quant_method')}): dequantise it first")
    if getattr(model, "peft_config", None):
        raise InputError("the model has an adapter: merge it first, see converters.adapters")
    _check_names(model)


def _loading_dtype(model: PreTrainedModel, *, widens: bool) -> torch.dtype:
    """Return the dtype in which a saved model has to be loaded.

    Raises:
        InputError: parameters of several dtypes would not survive loading.
    """
    main = main_dtype(model)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(dtypes) == 1:
        return main
    if widens:
        return reduce(torch.promote_types, dtypes)
    # Loading casts every tensor to one dtype, except for those that the architecture keeps in float32.
    state = model.state_dict()
    wrong = [name for name, dtype in loaded_dtypes(model, main).items() if state[name].dtype != dtype]
    if wrong:
        raise InputError(
            f"the model has parameters in {', '.join(sorted(map(str, dtypes)))}, and loading would cast {wrong[0]} "
            f"to another dtype: cast it first with converters.dtypes.cast_weights(model, {main})"
        )
    return main


def _check_names(model: PreTrainedModel) -> None:
    """Check that a module with two names also is one module in a model that is built from the config.

    Raises:
        InputError: it is two modules there.
    """
    places = module_places(model)
    if not places:
        return
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    modules = dict(fresh.named_modules(remove_duplicate=False))
    for name, first in places.items():
        # A layer's factors are not modules of the architecture; the layer itself is.
        if name in modules and first in modules and modules[name] is not modules[first]:
            raise InputError(
                f"{first} and {name} are one module in this model but two in its architecture, so the folder would not "
                "load as it was saved: replace one of them by a copy (copy.deepcopy) first"
            )


@contextmanager
def _swapped_config(model: PreTrainedModel, config: PreTrainedConfig) -> Iterator[None]:
    """Give the model another config within the block, since save_pretrained changes the config that it saves."""
    original = model.config
    model.config = config
    try:
        yield
    finally:
        model.config = original


@contextmanager
def _names_declared(model: PreTrainedModel) -> Iterator[None]:
    """Declare all names of a tensor within the block, so that save_pretrained writes the tensor once."""
    declared = model._tied_weights_keys
    if others := other_names(model):
        # This sets an attribute of the model, which hides that of its class.
        patterns = {f"^{re.escape(name)}$": first for name, first in others.items()}
        model._tied_weights_keys = {**dict(declared or {}), **patterns}
    try:
        yield
    finally:
        if others:
            model._tied_weights_keys = declared


def _finish_config(path: Path, dtype: str, guarded: bool) -> None:
    """Correct the dtype in a written ``config.json``, remove paths from it, and add the guard."""
    config = _without_paths(json.loads(path.read_text(encoding="utf-8")))
    # transformers writes the dtype of the first parameter, which may be one of the few that remain in float32.
    for part in (config, *(value for value in config.values() if isinstance(value, dict) and "dtype" in value)):
        part["dtype"] = dtype
    if guarded:
        config["transformers_weights"] = GUARD
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _without_paths(value: Any) -> Any:
    """Remove the paths that nested configs were loaded from: they only mean something on this machine."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items() if key != "_name_or_path"}
    return [_without_paths(item) for item in value] if isinstance(value, list) else value


def _read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Read and check a folder's config, and remove the guard from it."""
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
            f"{path}: the model is quantised with {entry.get('quant_method')!r}; it has no low-rank factors "
            f"({QUANT_METHOD!r}): load it with transformers"
        )
    try:
        LowRankConfig(**entry)
    except (TypeError, AttributeError) as error:
        raise InputError(f"{path}: the quantization_config is malformed: {error}") from error


def _model_class(config: PreTrainedConfig, folder: Path, trust_remote_code: bool) -> type[PreTrainedModel]:
    """The class that the config names, from transformers or from code in the folder."""
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
    # The file holds a tensor with several names under the first one only.
    others = other_names(model)
    missing = {name for name in info["missing_keys"] if others.get(name, name) in info["missing_keys"]}
    problems = [f"missing: {name}" for name in sorted(missing)]
    problems += [f"unexpected: {name}" for name in sorted(info["unexpected_keys"])]
    problems += [
        f"wrong shape: {name} is {tuple(actual)}, the config requires {tuple(expected)}"
        for name, actual, expected in sorted(info["mismatched_keys"])
    ]
    problems += [str(message) for message in info.get("error_msgs", [])]
    if problems:
        first_problems = "; ".join(problems[:5]) + ("; …" if len(problems) > 5 else "")
        raise InputError(f"{folder}: weights do not fit config.json ({len(problems)} problems): {first_problems}")
