"""Which columns hold the input and the label, and what a label means to the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, Image, Value
from transformers import PreTrainedConfig

from converters.errors import InputError
from converters.model_config import class_count, class_names
from prehab_export.config import DataConfig
from prehab_export.tasks import Task

IMAGE_NAMES = ("image", "img", "picture", "photo", "pixel_values")
TEXT_NAMES = ("text", "sentence", "content", "review", "document", "article", "body", "comment", "tweet", "message")
LABEL_NAMES = ("label", "labels", "target", "targets", "class", "category", "sentiment", "y")
PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("question", "passage"),
    ("query", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
)
# Numbers that count rows rather than name classes.
INDEX_NAMES = ("idx", "id", "index", "guid", "unnamed: 0")


@dataclass(frozen=True)
class Columns:
    """Names of the columns in use; ``pair`` holds the second text of a sentence pair."""

    input: str
    pair: str | None = None
    label: str | None = None


def choose_columns(rows: Dataset, config: DataConfig, task: Task) -> Columns:
    """The columns that the configuration names, or those that features and common names give away.

    Raises:
        InputError: a column that is not there or cannot be what it was named for, or several that could be.
    """
    for option, name in (
        ("--input-column", config.input_column),
        ("--pair-column", config.pair_column),
        ("--label-column", config.label_column),
    ):
        if name is not None and name not in rows.column_names:
            raise InputError(f"{option}: {config.data} has no column {name!r}; it has {_listed(rows.column_names)}")
    if task.name == "text-generation":
        return Columns(_input_column(rows, config, _text_columns(rows), TEXT_NAMES))
    label = _label_column(rows, config, task)
    if task.name == "image-classification":
        return Columns(_input_column(rows, config, _image_columns(rows), IMAGE_NAMES), label=label)
    texts = [name for name in _text_columns(rows) if name != label]
    first, second = _pair_columns(config, texts)
    if first is None:
        first = _input_column(rows, config, [name for name in texts if name != second], TEXT_NAMES)
    return Columns(first, second, label)


def _pair_columns(config: DataConfig, texts: Sequence[str]) -> tuple[str | None, str | None]:
    """A well-known pair, unless a column was named."""
    if config.input_column is not None or config.pair_column is not None:
        if config.pair_column is not None and config.pair_column not in texts:
            raise InputError(
                f"--pair-column: {config.pair_column!r} does not hold text; columns that do: {_listed(texts)}"
            )
        return None, config.pair_column
    by_lower = {name.lower(): name for name in texts}
    for first, second in PAIR_NAMES:
        if first in by_lower and second in by_lower:
            return by_lower[first], by_lower[second]
    return None, None


def _input_column(rows: Dataset, config: DataConfig, fitting: Sequence[str], names: Sequence[str]) -> str:
    kind = "images" if names is IMAGE_NAMES else "text"
    if config.input_column is not None:
        if config.input_column not in fitting:
            raise InputError(
                f"--input-column: {config.input_column!r} of {config.data} does not hold {kind} "
                f"({rows.features[config.input_column]}); columns that do: {_listed(fitting)}"
            )
        return config.input_column
    found = _by_name(fitting, names)
    if len(found) == 1 or len(fitting) == 1:
        return (found or fitting)[0]
    if not fitting:
        raise InputError(f"{config.data} has no column of {kind}; it has {_listed(rows.column_names)}")
    raise InputError(f"{config.data} has several columns of {kind}, {_listed(fitting)}: choose with --input-column")


def _label_column(rows: Dataset, config: DataConfig, task: Task) -> str:
    possible = [name for name, feature in rows.features.items() if _can_label(feature)]
    if config.label_column is not None:
        if config.label_column not in possible:
            raise InputError(
                f"--label-column: {config.label_column!r} of {config.data} holds {rows.features[config.label_column]}, "
                "not one class a row (integers or names)"
            )
        return config.label_column
    possible = [name for name in possible if name not in (config.input_column, config.pair_column)]
    classes = [name for name in possible if isinstance(rows.features[name], ClassLabel)]
    named = [name for name in possible if name.lower() not in INDEX_NAMES]
    whole = [name for name in named if not _is_text(rows.features[name])]
    for found in (_by_name(classes, LABEL_NAMES), classes, _by_name(possible, LABEL_NAMES), whole):
        if len(found) == 1:
            return found[0]
        if found:
            break
    else:
        rest = _spare_texts(rows, config, task, named)
        if len(rest) == 1:
            return rest[0]
    raise InputError(
        f"cannot tell which column of {config.data} holds the labels: it has {_listed(rows.column_names)}; "
        "choose with --label-column"
    )


def _spare_texts(rows: Dataset, config: DataConfig, task: Task, possible: Sequence[str]) -> list[str]:
    """Columns of class names, by exclusion: text columns that are not wanted, or not known, as input."""
    rest = [name for name in possible if name.lower() not in TEXT_NAMES]
    input_is_elsewhere = task.name == "image-classification" or len(rest) < len(possible) or config.input_column
    return rest if input_is_elsewhere else []


def _by_name(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    return [column for column in columns if column.lower() in names]


def _text_columns(rows: Dataset) -> list[str]:
    return [name for name, feature in rows.features.items() if _is_text(feature)]


def _image_columns(rows: Dataset) -> list[str]:
    return [name for name, feature in rows.features.items() if holds_images(feature)]


def holds_images(feature: object) -> bool:
    """An Image, or encoded bytes as a parquet file without the Hugging Face header has them."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, Image) or (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"))


def _is_text(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _can_label(feature: object) -> bool:
    whole = isinstance(feature, Value) and (feature.dtype.startswith(("int", "uint")) or feature.dtype == "bool")
    return whole or _is_text(feature) or isinstance(feature, ClassLabel)


def read_labels(rows: Dataset, column: str, model_config: PreTrainedConfig, split: str) -> np.ndarray:
    """The model's class of every row, int64.

    Class names are matched with the model's ``label2id``, whatever their order or case; numbers are taken as
    they are.

    Raises:
        InputError: a label that is missing, unknown to the model, or out of range; the message names the row.
    """
    values = rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    missing = next((row for row, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise InputError(f"row {missing} of {split} has no label in column {column!r}")
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        labels = _from_class_names(np.asarray(values, np.int64), feature.names, model_config, column)
    elif _is_text(feature):
        labels = _from_strings(values, model_config, column, split)
    else:
        labels = np.asarray(values, np.int64)
    _check_range(labels, class_count(model_config), column, split)
    return labels


def _check_range(labels: np.ndarray, classes: int, column: str, split: str) -> None:
    if (labels == -1).all():
        raise InputError(
            f"every label of {split} is -1: the answers of this split are kept secret; "
            "name one that has labels with --eval-split or --train-split"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        row = wrong[0]
        raise InputError(
            f"row {row} of {split} has label {labels[row]} in column {column!r}, "
            f"but the model has {classes} classes (0 to {classes - 1}); {wrong.size} rows are out of range"
        )


def _from_class_names(
    values: np.ndarray, names: Sequence[str], model_config: PreTrainedConfig, column: str
) -> np.ndarray:
    ids = _ids_by_name(model_config)
    strange = [name for name in names if _folded(name) not in ids]
    if all(ids.get(_folded(name), position) == position for position, name in enumerate(names)):
        return values  # same order, or names that say nothing of each other: positions are all there is
    if strange:
        raise InputError(
            f"classes {_listed(strange)} of column {column!r} are unknown to the model, which has "
            f"{_listed(list(_ids_by_name(model_config)))}; take them out or use numbers"
        )
    table = np.asarray([ids[_folded(name)] for name in names])
    return np.where(values < 0, values, table[np.clip(values, 0, None)])


def _from_strings(values: Sequence[str], model_config: PreTrainedConfig, column: str, split: str) -> np.ndarray:
    ids = _ids_by_name(model_config)
    labels = []
    for row, value in enumerate(values):
        label = ids.get(_folded(value))
        if label is None and not value.strip().removeprefix("-").isdecimal():
            raise InputError(
                f"row {row} of {split} has label {value!r} in column {column!r}, which the model does not know; "
                f"its classes are {_listed(list(_ids_by_name(model_config)))}"
            )
        labels.append(int(value) if label is None else label)
    return np.asarray(labels, np.int64)


def _ids_by_name(model_config: PreTrainedConfig) -> dict[str, int]:
    # Some files have the two the wrong way round; the model's outputs are ordered by id2label.
    return {_folded(name): label for label, name in class_names(model_config).items()}


def _folded(name: str) -> str:
    return name.strip().casefold()


def _listed(names: Sequence[str]) -> str:
    shown = [repr(str(name)) for name in names[:12]]
    return (", ".join(shown) or "none") + (f" and {len(names) - 12} more" if len(names) > 12 else "")
