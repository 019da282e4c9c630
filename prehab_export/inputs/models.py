"""Models, tokenizers and image processors as transformers stores them, checked before anything relies on them.

Weights come from safetensors only, and code from a repository never runs unless it was asked for.
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
from prehab_export.inputs.stored_weights import check_has_weights
from prehab_export.inputs.tasks import TASKS, Task
from prehab_export.system import say, sha256_of, sha256_of_all

# What a model, its tokenizer or its processor is read from. Vocabularies have many names (PhoBERT's bpe.codes).
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
    """The configuration of a local folder or a hub id; kernels of a GPU that it asks for give way to PyTorch's own.

    Raises:
        InputError: no such folder, no config.json in it, not on the hub or the hub out of reach, an unknown
            architecture, or one that comes as code and may not run.
    """
    check_location(model)
    with readable(model, "config.json"), quiet():
        config = transformers.AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    settle_architectures(config)
    if asked := forget_kernels(config):
        _say_kernels_forgotten(model, asked)
    return config


@cache
def _say_kernels_forgotten(model: str, asked: str) -> None:
    """Once for each model, which is read in many places."""
    say(f"  {model} asks for {asked}, which not every machine has: PyTorch's own code is used instead")


def check_task(config: PreTrainedConfig, task: Task) -> None:
    """Refuse a model that was not made for the task, from its configuration alone.

    Raises:
        InputError: another kind of model (the message names the tasks that fit), a regression or multi-label
            head, or weights that are already quantised or factored.
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
    """The task that a model was made for, from the head that its configuration names.

    Raises:
        InputError: it names no head, or one of no task known here.
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
        raise InputError(f"the model solves {problem}; only classifiers with one label a sample are supported")
    if class_count(config) < 2:
        raise InputError(
            f"the model has {class_count(config)} output, which makes it a regression; "
            "only classifiers with two classes or more are supported"
        )


def load_model(
    model: str,
    task: Task,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in evaluation mode on the CPU, every weight read and finite. In float32 it takes 4 bytes a weight
    (28 GB for 7 billion); move it with ``.to(device)``.

    Raises:
        InputError: no safetensors weights, a damaged file, weights that are missing, of another shape, or NaN/Inf.
    """
    check_location(model)
    check_has_weights(model)
    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    with readable(model, "weights"), quiet():
        loaded, info = _auto_class(task).from_pretrained(
            model,
            config=config,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they come back in info, by name
            output_loading_info=True,
        )
    _check_loading(model, info)
    _check_finite(model, loaded)
    if task.name == "text-classification" and not in_vocabulary(padding_token(loaded.config), loaded.config):
        # Decoders with a classification head find each row's last token by this id.
        text_config(loaded.config).pad_token_id = padding_id(loaded.config)
    return loaded.eval()


def empty_model(config: PreTrainedConfig, task: Task, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model's modules on the meta device: names and shapes, no weights.

    Raises:
        InputError: the configuration does not make a model of this task.
    """
    try:
        with torch.device("meta"), quiet():
            return _auto_class(task).from_config(config, trust_remote_code=trust_remote_code).eval()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"config.json does not make a model for {task.name}: {first_line(error)}") from error


def make_model(config: PreTrainedConfig, task: Task, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of this configuration in float32, with the weights that transformers gives it to begin with."""
    with quiet():
        return _auto_class(task).from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)


def input_names(config: PreTrainedConfig, task: Task) -> frozenset[str] | None:
    """Names that the model's forward pass takes and makes use of; None for a model that comes as code.

    Tokenizers offer more than some models take (``token_type_ids``).
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
    """How many tokens the model's positions reach; None where nothing bounds them.

    RoBERTa and its kin start counting after the padding index, so that part of their table is never used.
    """
    limit = positions(config)
    if limit is None:
        return None
    for name, module in empty_model(config, task, trust_remote_code=trust_remote_code).named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return limit - module.padding_idx - 1
    return limit


def padding_id(config: PreTrainedConfig) -> int:
    """The id to pad with: the model's own, else its end-of-text, else 0 (a mask hides it)."""
    candidates = (padding_token(config), *end_tokens(config))
    return next((token for token in candidates if token is not None and in_vocabulary(token, config)), 0)


def load_processor(model: str, task: Task, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer, or for images its image processor, working from PIL alone.

    Raises:
        InputError: it is not there, or knows no words.
    """
    check_location(model)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if task.name == "image-classification":
        with readable(model, "image processor (preprocessor_config.json)"), quiet():
            # Without torchvision, and the same numbers whether or not it is installed.
            return transformers.AutoImageProcessor.from_pretrained(model, backend="pil", **options)
    with readable(model, "tokenizer"), quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, **options)
    # Where the files are missing, transformers makes one of special tokens only, without a word.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise InputError(f"{model} has no tokenizer files; put tokenizer.json (or the like) beside the model")
    return tokenizer


def fingerprint(model: str, *, revision: str | None = None, sha256_of: Callable[[Path], str] = sha256_of) -> str:
    """What the model is, by content: a hash over a folder's files, or a hub repository's commit.

    Args:
        sha256_of: a file's hash; one that remembers saves reading large files again.

    Raises:
        InputError: there is no such model.
    """
    check_location(model)
    if not Path(model).is_dir():
        with readable(model, "config.json"):
            # The hub's cache lays files out as snapshots/<commit>/<file>; this works offline too.
            return Path(hf_hub_download(model, "config.json", revision=revision)).parent.name
    files = [path for path in sorted(Path(model).iterdir()) if path.is_file() and path.suffix in _MODEL_FILES]
    return sha256_of_all({path.name: sha256_of(path) for path in files})


def _auto_class(task: Task) -> Any:
    return getattr(transformers, task.auto_class)


def _check_loading(model: str, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"{model} lacks weights: {_some(missing)}; a random head or layer would take their place")
    wrong = [f"{name} {tuple(found)} for {tuple(due)}" for name, found, due in sorted(info["mismatched_keys"])]
    if wrong:
        raise InputError(f"weights of {model} do not fit its config.json: {_some(wrong)}")
    if info["error_msgs"]:
        raise InputError(f"cannot load {model}: {_some(list(info['error_msgs']))}")


def _check_finite(model: str, loaded: PreTrainedModel) -> None:
    for name, tensor in loaded.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{name} of {model} holds NaN or Inf; the file is damaged or training diverged")


def _some(names: list[str]) -> str:
    rest = len(names) - 5
    return ", ".join(names[:5]) + (f" and {rest} more" if rest > 0 else "")
