"""Loads models, tokenizers and image processors saved by transformers, and checks them before anything relies on them.

Weights are read from safetensors only, and code from a repository never runs unless the user asked for it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from converters.errors import InputError
from converters.model_config import (
    architecture,
    class_count,
    code_references,
    compression,
    end_tokens,
    forget_kernels,
    in_vocabulary,
    padding_token,
    positions,
    problem_type,
    settle_architectures,
    text_config,
)
from converters.onnx.inputs import distinguishes_token_types
from prehab_export.inputs.model_source import check_location, first_line, quiet, readable
from prehab_export.inputs.stored_weights import check_fit_model, check_has_weights, load_exceptions, weight_files
from prehab_export.inputs.tasks import TASKS, Task
from prehab_export.inputs.widening import widen_on_use
from prehab_export.system import say, sha256_of, sha256_of_all

# Suffixes of files from which a model, its tokenizer or its processor is read. Vocabularies have many names (PhoBERT's
# is bpe.codes).
_MODEL_FILES = frozenset(
    {".json", ".safetensors", ".txt", ".model", ".jinja", ".py"}
    | {".codes", ".bpe", ".vocab", ".tsv", ".spm", ".tiktoken", ".tokenizer"}
)
_ARCHITECTURES: dict[str, Mapping[str, str | Sequence[str]]] = {
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "text-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "text-generation": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


def load_config(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the configuration of a local folder or a hub id; GPU kernels that it requests are replaced by PyTorch code.

    Raises:
        InputError: there is no such folder, it has no config.json, the model is not on the hub or the hub is out of
            reach, the architecture is unknown, or it comes as code that may not run.
    """
    check_location(model)
    with readable(model, "config.json"), quiet():
        config = transformers.AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    settle_architectures(config)
    if kernels := forget_kernels(config):
        _say_kernels_replaced(model, kernels)
    return config


@cache
def _say_kernels_replaced(model: str, kernels: str) -> None:
    """Print this once per model (hence the cache): configurations are loaded in many places."""
    say(f"  {model} asks for {kernels}, which not every machine has: PyTorch's own code is used instead")


def check_task(config: PreTrainedConfig, task: Task) -> None:
    """Check from the configuration alone that the model was made for the task.

    Raises:
        InputError: the model is of another kind (the message names the tasks that fit), has a regression or
            multi-label head, or its weights are already quantised or factored.
    """
    entries = compression(config)
    if entries is not None:
        raise InputError(
            f"the model is already compressed ({entries.get('quant_method', 'unknown method')}); "
            "give the original model with float weights"
        )
    name = architecture(config)
    if name is not None and not _fits(config, name, task):
        others = [other.name for other in TASKS.values() if _fits(config, name, other)]
        advice = f"it fits {', '.join(others)}" if others else f"it has no head for any of {', '.join(TASKS)}"
        raise InputError(f"{name} is not a model for {task.name}; {advice}")
    if task.metric == "accuracy":
        _check_classes(config)


def task_of(config: PreTrainedConfig) -> Task:
    """Return the task that a model was made for, from the head that its configuration names.

    Raises:
        InputError: the configuration names no head, or one that belongs to no known task.
    """
    name = architecture(config)
    for task in TASKS.values():
        if name is not None and _fits(config, name, task):
            return task
    raise InputError(f"{name or 'the model'} has no head for any of {', '.join(TASKS)}")


def _fits(config: PreTrainedConfig, name: str, task: Task) -> bool:
    known: set[str] = set()
    for names in _ARCHITECTURES[task.name].values():
        known.update((names,) if isinstance(names, str) else names)
    return name in known or task.auto_class in code_references(config)


def _check_classes(config: PreTrainedConfig) -> None:
    problem = problem_type(config)
    if problem not in (None, "single_label_classification"):
        raise InputError(f"the model solves {problem}; only classifiers with one label per sample are supported")
    if class_count(config) < 2:
        raise InputError(
            f"the model has {class_count(config)} output, which makes it a regression; "
            "only classifiers with at least two classes are supported"
        )


def load_model(
    model: str,
    task: Task,
    *,
    dtype: torch.dtype | None = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the model in evaluation mode on the CPU, and check that every weight was read and is finite.

    In float32 it takes 4 bytes per weight (28 GB for 7 billion). Move it with ``.to(device)``.

    Args:
        dtype: dtype of the weights. None maps weights in half precision from their files as they are stored, and lets
            every module compute in float32 (see `widening`). If some weights are stored in float32, they stay in it;
            in any other mixture, all are read in float32. Such a model can be run, but not trained or exported.

    Raises:
        InputError: there are no safetensors weights, a file is damaged, or weights are missing, quantised, have another
            shape, or hold NaN/Inf.
    """
    check_location(model)
    check_has_weights(model)
    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    weights = weight_files(model, revision=revision, named=getattr(config, "transformers_weights", None))

    def load(dtype: torch.dtype) -> PreTrainedModel:
        with readable(model, "weights"), quiet():
            loaded, info = _auto_class(task).from_pretrained(
                model,
                config=config,
                dtype=dtype,
                revision=revision,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # info lists them by name
                output_loading_info=True,
            )
        _check_loading(model, info)
        return loaded

    as_stored = dtype is None
    loaded = load(dtype or weights.main_half or torch.float32)
    check_fit_model(weights, loaded)
    if as_stored and weights.main_half is not None and not load_exceptions(weights, loaded):
        loaded = load(torch.float32)
    _check_finite(model, loaded)
    if task.name == "text-classification" and not in_vocabulary(padding_token(loaded.config), loaded.config):
        # Decoders with a classification head find each row's last token by this id.
        text_config(loaded.config).pad_token_id = padding_id(loaded.config)
    if as_stored:
        widen_on_use(loaded)
    return loaded.eval()


def empty_model(config: PreTrainedConfig, task: Task, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model's modules on the meta device: names and shapes, no weights.

    Raises:
        InputError: no model for this task can be built from the configuration.
    """
    try:
        with torch.device("meta"), quiet():
            return _auto_class(task).from_config(config, trust_remote_code=trust_remote_code).eval()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"cannot build a model for {task.name} from config.json: {first_line(error)}") from error


def make_model(config: PreTrainedConfig, task: Task, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a model of this configuration in float32, with the initial weights of transformers."""
    with quiet():
        return _auto_class(task).from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)


def input_names(config: PreTrainedConfig, task: Task) -> frozenset[str] | None:
    """Return the names of the inputs that the model's forward pass uses; None for a model that comes as code.

    Some models do not use all that their tokenizer produces (``token_type_ids``).
    """
    try:
        classes = _auto_class(task)._model_mapping[type(config)]
    except KeyError:
        return None
    model_class = classes[0] if isinstance(classes, tuple) else classes
    names = frozenset(inspect.signature(model_class.forward).parameters)
    if "token_type_ids" in names and not distinguishes_token_types(empty_model(config, task)):
        names -= {"token_type_ids"}
    return names


def longest_input(config: PreTrainedConfig, task: Task, *, trust_remote_code: bool = False) -> int | None:
    """Return the largest number of tokens that the model has positions for; None if there is no limit.

    RoBERTa and similar models start counting after the padding index, so part of their table is never used.
    """
    limit = positions(config)
    if limit is None:
        return None
    for name, module in empty_model(config, task, trust_remote_code=trust_remote_code).named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return limit - module.padding_idx - 1
    return limit


def padding_id(config: PreTrainedConfig) -> int:
    """Return the id to pad with: the model's padding id, else its end-of-text id, else 0 (a mask hides it)."""
    candidates = (padding_token(config), *end_tokens(config))
    return next((token for token in candidates if token is not None and in_vocabulary(token, config)), 0)


def load_processor(model: str, task: Task, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the model's tokenizer or, for images, its image processor, which then needs nothing but PIL.

    Raises:
        InputError: its files are missing, or the tokenizer has special tokens only.
    """
    check_location(model)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if task.name == "image-classification":
        with readable(model, "image processor (preprocessor_config.json)"), quiet():
            # The PIL backend gives the same numbers whether or not torchvision is installed.
            return transformers.AutoImageProcessor.from_pretrained(model, backend="pil", **options)
    with readable(model, "tokenizer"), quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, **options)
    # If the files are missing, transformers silently builds a tokenizer of special tokens only.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise InputError(f"{model} has no tokenizer files; put tokenizer.json (or the like) beside the model")
    return tokenizer


def fingerprint(model: str, *, revision: str | None = None, sha256_of: Callable[[Path], str] = sha256_of) -> str:
    """Identify the model by its content: a hash over the files of a folder, or the commit of a hub repository.

    Args:
        sha256_of: computes a file's hash; a function with a cache avoids reading large files again.

    Raises:
        InputError: there is no such model.
    """
    check_location(model)
    if not Path(model).is_dir():
        with readable(model, "config.json"):
            # The hub's cache stores files as snapshots/<commit>/<file>; this works offline too.
            return Path(hf_hub_download(model, "config.json", revision=revision)).parent.name
    files = [path for path in sorted(Path(model).iterdir()) if path.is_file() and path.suffix in _MODEL_FILES]
    return sha256_of_all({path.name: sha256_of(path) for path in files})


def _auto_class(task: Task) -> Any:
    return getattr(transformers, task.auto_class)


def _check_loading(model: str, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"{model} lacks weights: {_some(missing)}; they would be replaced by random values")
    mismatched = [
        f"{name} {tuple(stored)} for {tuple(expected)}" for name, stored, expected in sorted(info["mismatched_keys"])
    ]
    if mismatched:
        raise InputError(f"weights of {model} do not fit its config.json: {_some(mismatched)}")
    if info["error_msgs"]:
        raise InputError(f"cannot load {model}: {_some(list(info['error_msgs']))}")


def _check_finite(model: str, loaded: PreTrainedModel) -> None:
    for name, tensor in loaded.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{name} of {model} holds NaN or Inf; the file is damaged or training diverged")


def _some(names: list[str]) -> str:
    rest = len(names) - 5
    return ", ".join(names[:5]) + (f" and {rest} more" if rest > 0 else "")
