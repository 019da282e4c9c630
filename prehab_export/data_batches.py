"""How rows become batches: images through the image processor, texts through the tokenizer, windows as they are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from transformers import PreTrainedConfig

from converters.errors import InputError
from converters.model_config import image_channels, vocabulary_size
from prehab_export.data_columns import Columns, read_labels
from prehab_export.data_text import token_windows
from prehab_export.models import input_names, padding_id
from prehab_export.tasks import Batch, Task

Collate = Callable[[Sequence[int]], Batch]


@dataclass(frozen=True)
class Encoder:
    """What it takes to turn rows into model inputs. ``processor`` is a tokenizer, or an image processor; ``length``
    is the longest text or the window in tokens."""

    task: Task
    processor: Any
    model_config: PreTrainedConfig
    columns: Columns
    length: int | None


def encode(rows: Dataset, split: str, encoder: Encoder, most_windows: int | None = None) -> tuple[int, Collate]:
    """How many samples the rows make, and how to make a batch of some of them.

    Labels are read, and text is checked for holes, here and now; images are decoded and texts tokenised when a
    batch is asked for. A language model's text is tokenised here, up to ``most_windows`` windows.

    Raises:
        InputError: a row that cannot be used; the message names it.
    """
    if encoder.task.name == "text-generation":
        windows = _windows(rows, split, encoder, most_windows)
        return len(windows), lambda picked: {"input_ids": torch.from_numpy(windows[picked].astype(np.int64))}
    assert encoder.columns.label is not None
    labels = torch.from_numpy(read_labels(rows, encoder.columns.label, encoder.model_config, split))
    is_image = encoder.task.name == "image-classification"
    inputs = _image_inputs(rows, split, encoder) if is_image else _text_inputs(rows, split, encoder)
    return len(rows), lambda picked: inputs(picked) | {"labels": labels[list(picked)]}


def _windows(rows: Dataset, split: str, encoder: Encoder, most: int | None) -> np.ndarray:
    assert encoder.length is not None
    texts = _texts(rows, encoder.columns.input, split)
    windows = token_windows(texts, encoder.processor, encoder.length, most)
    if not len(windows):
        raise InputError(
            f"the split {split} is too short for one window of {encoder.length} tokens; "
            "give more text or a smaller --sequence-length"
        )
    _check_vocabulary(windows, encoder)
    return windows


def _image_inputs(rows: Dataset, split: str, encoder: Encoder) -> Collate:
    column = encoder.columns.input
    images = rows.select_columns([column])
    if not isinstance(images.features[column], Image):
        images = images.cast_column(column, Image())
    mode = "L" if image_channels(encoder.model_config) == 1 else "RGB"

    def inputs(picked: Sequence[int]) -> Batch:
        decoded = [_decode(images, column, row, mode, split) for row in picked]
        return {"pixel_values": encoder.processor(images=decoded, return_tensors="pt")["pixel_values"]}

    return inputs


def _decode(images: Dataset, column: str, row: int, mode: str, split: str) -> Any:
    try:
        image = images[row][column]
        if image is None:
            raise OSError("there is none")
        return image.convert(mode)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for damaged files
        raise InputError(f"row {row} of {split}: cannot read the image in column {column!r}: {error}") from error


def _text_inputs(rows: Dataset, split: str, encoder: Encoder) -> Collate:
    columns, tokenizer = encoder.columns, encoder.processor
    _check_texts(rows, split, columns, tokenizer)
    names = [columns.input] if columns.pair is None else [columns.input, columns.pair]
    texts = rows.select_columns(names)
    wanted = input_names(encoder.model_config, encoder.task)
    fill = {"input_ids": padding_id(encoder.model_config), "token_type_ids": tokenizer.pad_token_type_id}

    def inputs(picked: Sequence[int]) -> Batch:
        chosen = texts[list(picked)]
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
            if wanted is None or name in wanted
        }

    return inputs


def _padded(sequences: Sequence[Sequence[int]], fill: int, side: str) -> torch.Tensor:
    """Rows of the longest one's length, int64. Not ``tokenizer.pad``, which wants a padding token to exist."""
    table = np.full((len(sequences), max(map(len, sequences))), fill, np.int64)
    for row, sequence in zip(table, sequences, strict=True):
        start = len(row) - len(sequence) if side == "left" else 0
        row[start : start + len(sequence)] = sequence
    return torch.from_numpy(table)


def _texts(rows: Dataset, column: str, split: str) -> Iterator[str]:
    """Every text of a column, a thousand rows in memory at a time."""
    row = 0
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        for text in table.column(column).to_pylist():
            if text is None:
                raise InputError(f"row {row} of {split} has no text in column {column!r}; take such rows out")
            yield text
            row += 1


def _check_texts(rows: Dataset, split: str, columns: Columns, tokenizer: Any) -> None:
    blank_is_nothing = columns.pair is None and not tokenizer("")["input_ids"]
    for column in filter(None, (columns.input, columns.pair)):
        for row, text in enumerate(_texts(rows, column, split)):
            if blank_is_nothing and not text.strip():
                raise InputError(f"row {row} of {split} has an empty text in column {column!r}; take such rows out")


def _check_vocabulary(ids: np.ndarray, encoder: Encoder) -> None:
    size = vocabulary_size(encoder.model_config)
    if size is not None and ids.size and ids.max() >= size:
        raise InputError(
            f"the tokenizer gives token {ids.max()}, but the model's vocabulary has {size}; they do not belong together"
        )
