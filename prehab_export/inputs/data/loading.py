"""Loads a dataset as samples for a task: rows to train on and rows to evaluate on, in a fixed order."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedConfig

from converters.errors import InputError
from prehab_export.config import AUTO, DataConfig
from prehab_export.inputs.data.columns import Columns, choose_columns
from prehab_export.inputs.data.encoding import Encoded, Encoder, encode
from prehab_export.inputs.data.images import check_shape
from prehab_export.inputs.data.labels import label_names
from prehab_export.inputs.data.samples import Samples, TaskData, cut_into_two
from prehab_export.inputs.data.source import Splits, choose_splits, open_source
from prehab_export.inputs.data.windows import start_tokens
from prehab_export.inputs.models import longest_input
from prehab_export.inputs.tasks import Task
from prehab_export.system import sha256_of, sha256_of_text

DEFAULT_WINDOW = 256
# Windows to evaluate a language model on by default hold this many tokens: perplexity is known to about 3% then, its
# change by compression to a fraction of that, and two cores evaluate a small model's graphs in minutes.
EVALUATION_TOKENS = 65536
# More than a short run ever uses; it bounds the time to tokenise a huge corpus.
MAX_TRAINING_WINDOWS = 65536


def load_data(
    config: DataConfig,
    task: Task,
    processor: Any,
    model_config: PreTrainedConfig,
    seed: int,
    *,
    trust_remote_code: bool = False,
    sha256_of: Callable[[Path], str] = sha256_of,
) -> TaskData:
    """Load samples to train on and samples to evaluate on.

    ``config.eval_samples`` selects the first windows for a language model, and random rows for a classifier, because
    its splits are often sorted by class. By default a language model gets those of ``EVALUATION_TOKENS``, with a
    warning if there are more, and a classifier all rows. If the data has only one split, its last windows, or random
    rows, are set aside for evaluation.

    Args:
        processor: tokenizer or image processor, from `prehab_export.inputs.models.load_processor`.
        trust_remote_code: allow building a model that comes as code, which is needed to find its longest input.
        sha256_of: computes a file's hash; a function with a cache avoids reading large files again.

    Raises:
        InputError: the data is missing, has no rows, or does not fit the task or the model.
    """
    source = open_source(config, sha256_of)
    splits = choose_splits(source, config)
    columns = choose_columns(splits.train, config, task)
    max_positions = None
    if task.name != "image-classification":
        max_positions = longest_input(model_config, task, trust_remote_code=trust_remote_code)
    length = _sequence_length(config, task, processor, max_positions)
    start = _window_start(config, task, processor, length)
    if splits.evaluation is not None:
        _check_same_columns(splits.evaluation, splits.evaluation_name, columns)
    names = _label_names(splits, columns)
    encoder = Encoder(task, processor, model_config, columns, length, start, config.labels_by_position, names)
    encoded = encode(splits.train, splits.train_name, encoder, MAX_TRAINING_WINDOWS)
    train, warnings, shape = _samples(encoded), list(encoded.warnings), encoded.image_shape
    is_text = task.name == "text-generation"
    default = max(1, EVALUATION_TOKENS // length) if is_text and length is not None else None
    wanted = config.eval_samples or default
    if splits.evaluation is None:
        train, evaluation = cut_into_two(train, task, seed)
    else:
        encoded = encode(splits.evaluation, splits.evaluation_name, encoder, None if wanted is None else wanted + 1)
        evaluation = _samples(encoded)
        warnings += encoded.warnings
        _check_same_shape(shape, encoded.image_shape, splits)
    if shape is not None:
        check_shape(shape, model_config, task, trust_remote_code)
    if wanted is not None and len(evaluation) > wanted:
        evaluation = evaluation.first(wanted) if is_text else evaluation.subset(wanted, seed)
        if config.eval_samples is None:
            warnings.append(
                f"evaluation takes the first {wanted} windows of {length} tokens; a larger --eval-samples takes more"
            )
    description = {
        "data": config.data,
        "config": config.data_config,
        "columns": {name: column for name, column in asdict(columns).items() if column is not None},
        "train_split": splits.train_name,
        "eval_split": splits.evaluation_name,
        "train_samples": len(train),
        "eval_samples": len(evaluation),
        "sequence_length": length,
        "window_start": processor.convert_ids_to_tokens(start) if task.name == "text-generation" else None,
        "labels_by_position": config.labels_by_position,
        "warnings": list(dict.fromkeys(warnings)),
    }
    fingerprint = _fingerprint(source.fingerprint, config, description, splits.evaluation is None)
    evaluation_settings = json.dumps([fingerprint, splits.evaluation_name, wanted])
    evaluation_fingerprint = sha256_of_text(evaluation_settings)
    return TaskData(train, evaluation, fingerprint, evaluation_fingerprint, description)


def _samples(encoded: Encoded) -> Samples:
    return Samples(np.arange(encoded.count), encoded.collate)


def _fingerprint(content: str, config: DataConfig, description: dict[str, Any], cut: bool) -> str:
    """Hash the content and all settings that determine the training samples.

    Settings of the evaluation samples are not part of it, except whether they are cut from the same split.
    """
    relevant = ("config", "columns", "train_split", "sequence_length", "window_start", "labels_by_position")
    used = {key: description[key] for key in relevant} | {"cut": cut}
    used |= {"encoding": config.encoding, "delimiter": config.separator, "header": config.header}
    return sha256_of_text(json.dumps([content, used], sort_keys=True))


def _label_names(splits: Splits, columns: Columns) -> tuple[str, ...]:
    """Collect the class names of both splits, because either may lack some classes."""
    if columns.label is None:
        return ()
    parts = [splits.train, *([] if splits.evaluation is None else [splits.evaluation])]
    return tuple(sorted(set().union(*(label_names(part, columns.label) for part in parts))))


def _check_same_columns(rows: Dataset, split: str, columns: Columns) -> None:
    for column in asdict(columns).values():
        if column is not None and column not in rows.column_names:
            raise InputError(f"the split {split} has no column {column!r}; it has {', '.join(rows.column_names)}")


def _check_same_shape(train: tuple[int, ...] | None, evaluation: tuple[int, ...] | None, splits: Splits) -> None:
    if train != evaluation:
        raise InputError(
            f"the image processor gives images of {splits.train_name} the shape {train}, but those of "
            f"{splits.evaluation_name} {evaluation}; set do_resize and a size in preprocessor_config.json, or resize "
            "the images"
        )


def _window_start(config: DataConfig, task: Task, processor: Any, length: int | None) -> tuple[int, ...]:
    """Return the ids that every window of a language model starts with."""
    if task.name != "text-generation":
        if config.window_start != AUTO:
            raise InputError(f"--window-start applies to windows of text; {task.name} has none")
        return ()
    if config.window_start == "none":
        return ()
    if config.window_start == "bos":
        if processor.bos_token_id is None:
            raise InputError("--window-start bos: the tokenizer has no BOS token; use --window-start none")
        return (processor.bos_token_id,)
    start = start_tokens(processor)
    if length is not None and length <= len(start):
        raise InputError(
            f"a window of {length} tokens leaves nothing to predict after the {len(start)} tokens that the tokenizer "
            "puts before a text; give a larger --sequence-length, or --window-start none"
        )
    return start


def _sequence_length(config: DataConfig, task: Task, processor: Any, max_positions: int | None) -> int | None:
    """Return the window of a language model or the longest text of a classifier, in tokens; None if unlimited."""
    if task.name == "image-classification":
        return None
    bounds = {} if max_positions is None else {f"the model's {max_positions} positions": max_positions}
    limit = processor.model_max_length
    if task.name == "text-classification" and limit < 1e9:  # transformers' "no limit" is 1e30
        bounds[f"the {limit} tokens that its tokenizer allows (model_max_length in tokenizer_config.json)"] = limit
    longest = min(bounds.values(), default=None)
    if config.sequence_length is not None:
        for bound, tokens in bounds.items():
            if config.sequence_length > tokens:
                raise InputError(f"--sequence-length {config.sequence_length} is more than {bound}")
        return config.sequence_length
    if task.name == "text-classification":
        return longest
    return DEFAULT_WINDOW if longest is None else min(DEFAULT_WINDOW, longest)
