"""Finds the columns that hold the input and the label."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, Image, Value

from converters.errors import InputError
from prehab_export.config import DataConfig
from prehab_export.inputs.data.chat import chat_columns
from prehab_export.inputs.tasks import Task

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
# Columns whose numbers count rows rather than name classes.
INDEX_NAMES = ("idx", "id", "index", "guid", "unnamed: 0")


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; ``pair`` holds the second text of a sentence pair."""

    input: str
    pair: str | None = None
    label: str | None = None


def choose_columns(rows: Dataset, config: DataConfig, task: Task) -> Columns:
    """Return the columns that the configuration names, or those recognised by their features and common names.

    Raises:
        InputError: a named column is missing or holds the wrong kind of data, or several columns are possible.
    """
    for option, name in (
        ("--input-column", config.input_column),
        ("--pair-column", config.pair_column),
        ("--label-column", config.label_column),
    ):
        if name is not None and name not in rows.column_names:
            raise InputError(f"{option}: {config.data} has no column {name!r}; it has {listed(rows.column_names)}")
    if task.name == "text-generation":
        return Columns(_language_column(rows, config))
    label = _label_column(rows, config, task)
    if task.name == "image-classification":
        return Columns(_input_column(rows, config, _image_columns(rows), IMAGE_NAMES), label=label)
    texts = [name for name in _text_columns(rows) if name != label]
    first, second = _pair_columns(config, texts)
    if first is None:
        first = _input_column(rows, config, [name for name in texts if name != second], TEXT_NAMES)
    return Columns(first, second, label)


def _language_column(rows: Dataset, config: DataConfig) -> str:
    """Return the column of text with a common name, else that of conversations, else any column of text."""
    texts, chats = _text_columns(rows), chat_columns(rows.features)
    if config.input_column is None and chats and not _by_name(texts, TEXT_NAMES):
        if len(chats) > 1:
            raise InputError(
                f"{config.data} has several columns of conversations, {listed(chats)}: choose with --input-column"
            )
        return chats[0]
    return _input_column(rows, config, [*texts, *(chats if config.input_column is not None else ())], TEXT_NAMES)


def _pair_columns(config: DataConfig, texts: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the columns of a well-known pair of texts, unless the configuration names a column."""
    if config.input_column is not None or config.pair_column is not None:
        if config.pair_column is not None and config.pair_column not in texts:
            raise InputError(
                f"--pair-column: {config.pair_column!r} does not hold text; columns that do: {listed(texts)}"
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
                f"({rows.features[config.input_column]}); columns that do: {listed(fitting)}"
            )
        return config.input_column
    matches = _by_name(fitting, names)
    if len(matches) == 1 or len(fitting) == 1:
        return (matches or fitting)[0]
    if not fitting:
        contents = ", ".join(f"{name!r} ({_describe(rows.features[name])})" for name in rows.column_names[:12])
        raise InputError(f"{config.data} has no column of {kind}; it has {contents or 'none'}")
    raise InputError(f"{config.data} has several columns of {kind}, {listed(fitting)}: choose with --input-column")


def _label_column(rows: Dataset, config: DataConfig, task: Task) -> str:
    possible = [name for name in rows.features if _can_label(rows, name)]
    if config.label_column is not None:
        if config.label_column not in possible:
            raise InputError(
                f"--label-column: {config.label_column!r} of {config.data} holds {rows.features[config.label_column]}, "
                "not one class per row (integers or names)"
            )
        return config.label_column
    possible = [name for name in possible if name not in (config.input_column, config.pair_column)]
    classes = [name for name in possible if isinstance(rows.features[name], ClassLabel)]
    named = [name for name in possible if name.lower() not in INDEX_NAMES]
    numbers = [name for name in named if not is_text(rows.features[name])]
    integers = [name for name in numbers if not _is_float(rows.features[name])]
    for candidates in (_by_name(classes, LABEL_NAMES), classes, _by_name(possible, LABEL_NAMES), integers, numbers):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            break
    else:
        rest = _spare_texts(rows, config, task, named)
        if len(rest) == 1:
            return rest[0]
    raise InputError(_no_label(rows, config, task, possible))


def _no_label(rows: Dataset, config: DataConfig, task: Task, possible: Sequence[str]) -> str:
    unfit = [name for name in _by_name(rows.column_names, LABEL_NAMES) if name not in possible]
    if unfit:
        feature = rows.features[unfit[0]]
        return (
            f"column {unfit[0]!r} of {config.data} holds {_describe(feature)}, not one class per row (integers or "
            "names); only classifiers are supported. Choose another column with --label-column"
        )
    if task.name == "image-classification" and rows.column_names == _image_columns(rows):
        return (
            f"{config.data} holds images without labels: labels are read from the names of at least two folders, or "
            "from a metadata.csv with the columns file_name and label"
        )
    if rows.column_names == _text_columns(rows)[:1]:
        return (
            f"{config.data} holds text without labels (names of folders are read as labels for images only); "
            "give a table (csv, json, parquet) with a column of labels"
        )
    return (
        f"cannot tell which column of {config.data} holds the labels: it has {listed(rows.column_names)}; "
        "choose with --label-column"
    )


def _spare_texts(rows: Dataset, config: DataConfig, task: Task, possible: Sequence[str]) -> list[str]:
    """Return text columns that may hold class names because they are not the input, by name or by exclusion."""
    rest = [name for name in possible if name.lower() not in TEXT_NAMES]
    input_is_elsewhere = task.name == "image-classification" or len(rest) < len(possible) or config.input_column
    return rest if input_is_elsewhere else []


def _by_name(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    return [column for column in columns if column.lower() in names]


def _text_columns(rows: Dataset) -> list[str]:
    return [name for name, feature in rows.features.items() if is_text(feature)]


def _image_columns(rows: Dataset) -> list[str]:
    return [name for name, feature in rows.features.items() if holds_images(feature)]


def holds_images(feature: object) -> bool:
    """Return whether a feature is an Image, or encoded bytes, as in a parquet file without the Hugging Face header."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, Image) or (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"))


def is_text(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _can_label(rows: Dataset, name: str) -> bool:
    feature = rows.features[name]
    if _is_float(feature):  # in a table with gaps, integers become floats (1.0 for 1)
        values = rows.select_columns([name]).with_format("arrow")[:].column(name).drop_null().to_numpy()
        return bool((np.isnan(values) | (values == np.rint(values))).all())
    is_integer = isinstance(feature, Value) and (feature.dtype.startswith(("int", "uint")) or feature.dtype == "bool")
    return is_integer or is_text(feature) or isinstance(feature, ClassLabel)


def _describe(feature: object) -> str:
    if _is_float(feature):
        return "numbers with fractions"
    if isinstance(feature, Value):
        return {"binary": "bytes", "large_binary": "bytes", "null": "nothing"}.get(feature.dtype, feature.dtype)
    if isinstance(feature, dict):
        return f"records of {', '.join(map(str, feature))}"
    return "lists" if isinstance(feature, list) or hasattr(feature, "feature") else type(feature).__name__


def _is_float(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith("float")


def listed(names: Sequence[str]) -> str:
    shown = [repr(str(name)) for name in names[:12]]
    return (", ".join(shown) or "none") + (f" and {len(names) - 12} more" if len(names) > 12 else "")
