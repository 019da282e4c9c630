"""Maps the labels of the data to the classes of the model.

Names are matched with the model's own (``id2label``), regardless of order, case and separators, and by any synonym that
a name lists ("tench, Tinca tinca"). Numbers are the model's class numbers. Names are matched by position only if the
user asks for it, or if nothing better is known: the model's classes have no names, and there are as many as in the
data. Shortened names ("neg", "pos") are accepted, with a warning, if each matches one class and each class one name.
Anything else is refused, because a class mistaken for another gives a wrong model and a wrong report without any sign.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, Value
from transformers import PreTrainedConfig

from converters.errors import InputError
from converters.model_config import class_count, class_names
from prehab_export.inputs.data.columns import is_text, listed

_WHOLE = re.compile(r"-?\d+(\.0*)?")
_UNKNOWN = -2  # -1 marks labels that are kept secret
# If this share of the data's classes match the model's in order, the lists are the same, and only a few names differ
# (ImageNet's second crane).
_SAME_LIST = 0.99
_MIN_LETTERS = 3  # of a shortened name


@dataclass(frozen=True)
class Labels:
    """The labels of a split.

    values: the model's class of every row (N, int64).
    warning: what had to be assumed to find the classes, if anything.
    """

    values: np.ndarray
    warning: str | None = None


def read_labels(
    rows: Dataset,
    column: str,
    model_config: PreTrainedConfig,
    split: str,
    by_position: bool = False,
    other_names: Sequence[str] = (),
) -> Labels:
    """Return the model's class of every row.

    Args:
        by_position: the data lists its classes in the model's order, whatever their names.
        other_names: class names that occur in other splits, if labels are strings.

    Raises:
        InputError: a label is missing, unknown to the model, ambiguous or out of range; the message names the row, or
            the classes of data and model.
    """
    values = rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    missing = next((row for row, value in enumerate(values) if _is_missing(value)), None)
    if missing is not None:
        raise InputError(f"row {missing} of {split} has no label in column {column!r}")
    feature, model, warning = rows.features[column], _ModelClasses(model_config), None
    if isinstance(feature, ClassLabel):
        labels, warning = _from_class_names(np.asarray(values, np.int64), feature.names, model, column, by_position)
    elif by_position:
        raise InputError(f"--labels-by-position: column {column!r} has labels without an order; write numbers there")
    elif is_text(feature):
        labels, warning = _from_strings(values, model, column, split, other_names)
    elif isinstance(feature, Value) and feature.dtype == "bool":
        labels = _from_booleans(values, model)
    else:
        labels = _from_numbers(_whole_numbers(np.asarray(values), column, split), model, column, split)
    _check_range(labels, model.count, column, split)
    return Labels(labels, warning)


def label_names(rows: Dataset, column: str) -> set[str]:
    """Return the class names in a column of strings; none if the column holds something else."""
    if not is_text(rows.features[column]):
        return set()
    return {
        value for value in rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist() if value
    }


class _ModelClasses:
    """The model's classes, with look-up by name."""

    def __init__(self, model_config: PreTrainedConfig) -> None:
        self.count = class_count(model_config)
        # label2id is reversed in some files; the model's outputs are ordered by id2label.
        self.names = class_names(model_config)
        self._by_name = _index((name, label) for label, name in self.names.items())
        parts = ((part, label) for label, name in self.names.items() for part in name.split(","))
        self._by_synonym = _index(parts)

    @property
    def shown(self) -> str:
        return listed(list(self.names.values()))

    @property
    def are_named(self) -> bool:
        """Whether the names say more than the numbers; LABEL_0 or 0 does not."""
        return any(_folded(name) not in (f"label{i}", f"class{i}", str(i)) for i, name in self.names.items())

    @property
    def by_whole_number(self) -> dict[int, int]:
        """Number → class, if the names are numbers that differ from the classes' positions; else empty."""
        if not self.are_named or not all(_WHOLE.fullmatch(name.strip()) for name in self.names.values()):
            return {}
        return {_whole(name): label for label, name in self.names.items()}

    def find(self, name: str, position: int | None = None) -> int | None:
        """Return the class with this name, or None; ``position`` decides between classes that share the name.

        Raises:
            InputError: several classes have the name.
        """
        parts = [part for part in name.split(",") if part.strip()]
        for matches in (
            self._by_name.get(_folded(name), []),
            self._by_synonym.get(_folded(name), []),
            sorted({label for part in parts for label in self._by_synonym.get(_folded(part), [])}),
        ):
            if len(matches) == 1:
                return matches[0]
            if position is not None and position in matches:
                return position
            if matches:
                shown = ", ".join(f"{label} ({self.names[label]!r})" for label in matches)
                raise InputError(
                    f"class {name!r} of the data may be any of the model's classes {shown}; write the number instead"
                )
        return _whole(name) if _WHOLE.fullmatch(name.strip()) else None

    def find_short(self, entries: Sequence[tuple[str, int | None]]) -> list[int]:
        """Complete a list of (name, class): a class of None is found by a shorter or longer form of its name.

        Returns:
            The class of every entry; an empty list if names and classes do not match one to one.
        """
        if not self.are_named or len(entries) != self.count:
            return []
        candidates = [
            [label for label, full in self.names.items() if _is_shortened(name, full)] if known is None else [known]
            for name, known in entries
        ]
        unique = [labels[0] for labels in candidates if len(labels) == 1]
        return unique if sorted(unique) == sorted(self.names) else []


def _is_missing(value: object) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _is_shortened(name: str, full: str) -> bool:
    """Return whether one name starts with the other, or with one of the synonyms in ``full``."""
    for synonym in full.split(","):
        short, long = sorted((_folded(name), _folded(synonym)), key=len)
        if len(short) >= _MIN_LETTERS and long.startswith(short):
            return True
    return False


def _index(entries: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    index: dict[str, list[int]] = defaultdict(list)
    for name, label in entries:
        if label not in index[_folded(name)]:
            index[_folded(name)].append(label)
    return dict(index)


def _check_range(labels: np.ndarray, classes: int, column: str, split: str) -> None:
    if (labels == -1).all():
        raise InputError(
            f"every label of {split} is -1: the labels of this split are kept secret; "
            "choose a split with labels with --eval-split or --train-split"
        )
    out_of_range = np.flatnonzero((labels < 0) | (labels >= classes))
    if out_of_range.size:
        row = out_of_range[0]
        raise InputError(
            f"row {row} of {split} has label {labels[row]} in column {column!r}, "
            f"but the model has {classes} classes (0 to {classes - 1}); {out_of_range.size} rows are out of range"
        )


def _from_class_names(
    values: np.ndarray, names: Sequence[str], model: _ModelClasses, column: str, by_position: bool
) -> tuple[np.ndarray, str | None]:
    if by_position:
        if len(names) > model.count:
            raise InputError(
                f"--labels-by-position: column {column!r} has {len(names)} classes, the model {model.count}"
            )
        return values, _by_position(names, model, "as requested")
    labels = [model.find(name, position) for position, name in enumerate(names)]
    unmatched = [position for position, label in enumerate(labels) if label is None]
    same_order = len(names) == model.count and all(label in (None, position) for position, label in enumerate(labels))
    if unmatched and same_order and not model.are_named:
        return values, _by_position(names, model, "because the model's classes have no names")
    if unmatched and same_order and len(names) - len(unmatched) >= _SAME_LIST * len(names):
        return values, _by_position(
            [names[position] for position in unmatched],
            model,
            "because all other classes are in the model's order",
            unmatched,
        )
    warning = None
    if unmatched and (completed := model.find_short(list(zip(names, labels, strict=True)))):
        labels, unmatched, warning = list(completed), [], _shortened(names, completed, model)
    used = [position for position in unmatched if (values == position).any()]
    if used:
        raise InputError(_unknown([names[position] for position in used], len(names), model, f"column {column!r}"))
    table = np.asarray([_UNKNOWN if label is None else label for label in labels])
    return np.where(values < 0, values, table[np.clip(values, 0, None)]), warning


def _shortened(names: Sequence[str], labels: Sequence[int], model: _ModelClasses) -> str:
    entries = zip(names, labels, strict=True)
    pairs = [(name, label) for name, label in entries if _folded(name) != _folded(model.names[label])]
    return f"classes of the data were matched with classes of the model that start the same: {_shown(pairs, model)}"


def _by_position(names: Sequence[str], model: _ModelClasses, why: str, positions: Sequence[int] | None = None) -> str:
    positions = range(len(names)) if positions is None else positions
    shown = _shown(list(zip(names, positions, strict=True)), model)
    return f"classes of the data were matched by position, {why}: {shown}"


def _shown(pairs: Sequence[tuple[str, int]], model: _ModelClasses) -> str:
    words = [f"{name!r} is {label} ({model.names.get(label, label)!r})" for name, label in pairs[:6]]
    return ", ".join(words) + (f" and {len(pairs) - 6} more" if len(pairs) > 6 else "")


def _unknown(names: Sequence[str], count: int, model: _ModelClasses, place: str) -> str:
    if model.are_named:
        classes = f"whose classes are {model.shown}"
    else:
        classes = f"whose {model.count} classes have no names, and the data has {count}"
    return (
        f"classes {listed(names)} of {place} are unknown to the model, {classes}; rename them, or put the data's names "
        f"into id2label of the model's config.json, or write the model's numbers (0 to {model.count - 1}) instead; "
        "if both lists are in the same order, give --labels-by-position"
    )


def _from_strings(
    values: Sequence[str], model: _ModelClasses, column: str, split: str, other_names: Sequence[str]
) -> tuple[np.ndarray, str | None]:
    label_of, warning = {value: model.find(value) for value in dict.fromkeys([*values, *other_names])}, None
    if None in label_of.values() and (labels := model.find_short(list(label_of.items()))):
        warning = _shortened(list(label_of), labels, model)
        label_of = dict(zip(label_of, labels, strict=True))
    unknown = next((row for row, value in enumerate(values) if label_of[value] is None), None)
    if unknown is not None:
        names = "" if model.are_named else ", which say nothing about their meaning"
        raise InputError(
            f"row {unknown} of {split} has label {values[unknown]!r} in column {column!r}, which the model does not "
            f"know; its classes are {model.shown}{names}; write these names or their numbers (0 to {model.count - 1}), "
            "or put the data's names into id2label of the model's config.json"
        )
    return np.asarray([label_of[value] for value in values], np.int64), warning


def _from_booleans(values: Sequence[bool], model: _ModelClasses) -> np.ndarray:
    labels = {value: model.find(str(value)) for value in (False, True)}
    return np.asarray([int(value) if None in labels.values() else labels[value] for value in values], np.int64)


def _whole_numbers(values: np.ndarray, column: str, split: str) -> np.ndarray:
    """Convert to integers: tables with a gap, and some exports, have 1.0 for 1."""
    integers = values.astype(np.int64)
    fractional = np.flatnonzero(integers != values)
    if fractional.size:
        raise InputError(
            f"row {fractional[0]} of {split} has label {values[fractional[0]]} in column {column!r}, which is not a "
            "class: classes are integers or names"
        )
    return integers


def _from_numbers(values: np.ndarray, model: _ModelClasses, column: str, split: str) -> np.ndarray:
    by_name = model.by_whole_number
    if not by_name or not all(value in by_name for value in values.tolist()):
        return values
    labels = np.asarray([by_name[value] for value in values.tolist()], np.int64)
    if ((values >= 0) & (values < model.count)).all() and (labels != values).any():
        raise InputError(
            f"the numbers in column {column!r} of {split} may be the model's classes (0 to {model.count - 1}) or their "
            f"names ({model.shown}); use words as names, in the data and in id2label of config.json"
        )
    return labels


def _whole(text: str) -> int:
    return int(text.strip().split(".")[0])


def _folded(name: str) -> str:
    """Return a name without case and separators, with accents normalised; numbers keep their sign."""
    name = unicodedata.normalize("NFKC", name).strip().casefold()
    return name if _WHOLE.fullmatch(name) else re.sub(r"[\s_-]+", "", name) or name
