"""Turns rows into batches: images with the image processor, texts with the tokenizer, windows as they are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedConfig

from converters.errors import InputError
from converters.model_config import vocabulary_size
from prehab_export.inputs.data.chat import chat_columns, chat_texts, unread_warnings
from prehab_export.inputs.data.columns import Columns
from prehab_export.inputs.data.images import ImageSplit, processed, processed_shape
from prehab_export.inputs.data.labels import read_labels
from prehab_export.inputs.data.windows import start_tokens, token_windows
from prehab_export.inputs.models import input_names, padding_id
from prehab_export.inputs.tasks import IGNORED, Batch, Task

Collate = Callable[[Sequence[int]], Batch]


@dataclass(frozen=True)
class Encoder:
    """Everything needed to turn rows into model inputs.

    processor: tokenizer or image processor.
    length: longest text, or size of a window, in tokens.
    start: ids that every window starts with.
    labels_by_position: the data lists its classes in the model's order, whatever their names.
    label_names: class names of all splits, if labels are strings.
    """

    task: Task
    processor: Any
    model_config: PreTrainedConfig
    columns: Columns
    length: int | None
    start: tuple[int, ...] = ()
    labels_by_position: bool = False
    label_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """Rows of a split as samples.

    count: number of samples.
    collate: makes a batch of the samples with these numbers.
    warnings: what had to be assumed about the data.
    image_shape: (C, H, W) of every image; None for text.
    """

    count: int
    collate: Collate
    warnings: tuple[str, ...] = ()
    image_shape: tuple[int, ...] | None = None


def encode(rows: Dataset, split: str, encoder: Encoder, max_windows: int | None = None) -> Encoded:
    """Turn the rows of a split into samples.

    Labels are read here, and text is checked for gaps and images for damage. Images are decoded and texts tokenised
    when a batch is made, except that a language model's text is tokenised here, up to ``max_windows`` windows.

    Raises:
        InputError: a row cannot be used (the message names it), or the image processor cannot handle the images.
    """
    if encoder.task.name == "text-generation":
        windows = _windows(rows, split, encoder, max_windows)
        warnings = unread_warnings(rows.features, encoder.columns.input)
        return Encoded(len(windows), lambda numbers: _window_batch(windows[numbers], len(encoder.start)), warnings)
    assert encoder.columns.label is not None
    labels = read_labels(
        rows, encoder.columns.label, encoder.model_config, split, encoder.labels_by_position, encoder.label_names
    )
    warnings = () if labels.warning is None else (labels.warning,)
    if encoder.task.name == "image-classification":
        images = ImageSplit.of(rows, encoder.columns.input, encoder.model_config, split)
        facts = images.check()
        shape = processed_shape(images, facts, encoder.processor)
        collate = _labelled(_image_inputs(images, encoder.processor), labels.values)
        return Encoded(len(rows), collate, (*warnings, *facts.warnings), shape)
    return Encoded(len(rows), _labelled(_text_inputs(rows, split, encoder), labels.values), warnings)


def _labelled(inputs: Collate, values: np.ndarray) -> Collate:
    labels = torch.from_numpy(values)
    return lambda numbers: inputs(numbers) | {"labels": labels[list(numbers)]}


def _image_inputs(images: ImageSplit, processor: Any) -> Collate:
    return lambda numbers: {"pixel_values": processed(processor, [images.decoded(row) for row in numbers])}


def _windows(rows: Dataset, split: str, encoder: Encoder, max_windows: int | None) -> np.ndarray:
    assert encoder.length is not None
    column, tokenizer = encoder.columns.input, encoder.processor
    if column in chat_columns(rows.features):
        start_text = "".join(tokenizer.convert_ids_to_tokens(start_tokens(tokenizer)))
        texts, separator = chat_texts(rows, column, split, tokenizer, start_text), ""
    else:
        texts, separator = _texts(rows, column, split), "\n"
    windows = token_windows(texts, tokenizer, encoder.length, max_windows, encoder.start, separator)
    if not len(windows):
        raise InputError(
            f"the split {split} is too short for one window of {encoder.length} tokens; "
            "give more text or a smaller --sequence-length"
        )
    _check_vocabulary(windows, encoder)
    return windows


def _window_batch(windows: np.ndarray, context_length: int) -> Batch:
    """Make a batch of windows whose first ``context_length`` tokens are context; the first is never a target anyway."""
    ids = torch.from_numpy(windows.astype(np.int64))
    if context_length < 2:
        return {"input_ids": ids}
    labels = ids.clone()
    labels[:, :context_length] = IGNORED
    return {"input_ids": ids, "labels": labels}


def _text_inputs(rows: Dataset, split: str, encoder: Encoder) -> Collate:
    columns, tokenizer = encoder.columns, encoder.processor
    _check_texts(rows, split, columns, tokenizer)
    names = [columns.input] if columns.pair is None else [columns.input, columns.pair]
    texts = rows.select_columns(names)
    used_names = input_names(encoder.model_config, encoder.task)
    fill = {"input_ids": padding_id(encoder.model_config), "token_type_ids": tokenizer.pad_token_type_id}

    def inputs(numbers: Sequence[int]) -> Batch:
        chosen = texts[list(numbers)]
        encoded = tokenizer(
            *(chosen[name] for name in names),
            truncation=encoder.length is not None,
            max_length=encoder.length,
            return_attention_mask=True,
            verbose=False,
        )
        _check_vocabulary(np.concatenate(encoded["input_ids"]), encoder)
        return {
            name: _padded(values, fill.get(name, 0), tokenizer.padding_side)
            for name, values in encoded.items()
            if used_names is None or name in used_names
        }

    return inputs


def _padded(sequences: Sequence[Sequence[int]], fill: int, side: str) -> torch.Tensor:
    """Pad sequences to the longest (int64). Unlike ``tokenizer.pad``, this works without a padding token."""
    table = np.full((len(sequences), max(map(len, sequences))), fill, np.int64)
    for row, sequence in zip(table, sequences, strict=True):
        start = len(row) - len(sequence) if side == "left" else 0
        row[start : start + len(sequence)] = sequence
    return torch.from_numpy(table)


def _texts(rows: Dataset, column: str, split: str) -> Iterator[str]:
    """Yield every text of a column, with a thousand rows in memory at a time."""
    row = 0
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        for text in table.column(column).to_pylist():
            if text is None:
                raise InputError(f"row {row} of {split} has no text in column {column!r}; remove such rows")
            yield text
            row += 1


def _check_texts(rows: Dataset, split: str, columns: Columns, tokenizer: Any) -> None:
    blank_has_no_tokens = columns.pair is None and not tokenizer("")["input_ids"]
    for column in filter(None, (columns.input, columns.pair)):
        for row, text in enumerate(_texts(rows, column, split)):
            if blank_has_no_tokens and not text.strip():
                raise InputError(f"row {row} of {split} has an empty text in column {column!r}; remove such rows")


def _check_vocabulary(ids: np.ndarray, encoder: Encoder) -> None:
    size = vocabulary_size(encoder.model_config)
    if size is not None and ids.size and ids.max() >= size:
        raise InputError(
            f"the tokenizer gives token {ids.max()}, but the model's vocabulary has {size} entries; they do not belong "
            "together"
        )
