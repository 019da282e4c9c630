"""What a label of the data means to the model.

Names are matched with the model's own (``id2label``), whatever their order, case or separators, and by any of the
synonyms that a name lists ("tench, Tinca tinca"). Numbers are the model's classes. By position goes only what nothing
better can be known of: a model whose classes have no names of their own, as many as the data has, or what was asked
for. Shortened names ("neg", "pos") are taken where each has one class and each class one of them, and that is said.
Anything else is refused: a class taken for another one is a wrong model and a wrong report, and nothing shows it.
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
_UNKNOWN = -2  # -1 stands for answers that are kept secret
# A list of so many classes in the model's order is the model's own list, but for a few names (ImageNet's second crane).
_SAME_LIST = 0.99
_SHORTEST = 3  # letters of a shortened name


@dataclass(frozen=True)
class Labels:
    """values: the model's class of every row (N, int64). warning: what had to be assumed to know them, if anything."""

    values: np.ndarray
    warning: str | None = None


def read_labels(
    rows: Dataset,
    column: str,
    model_config: PreTrainedConfig,
    split: str,
    by_position: bool = False,
    others: Sequence[str] = (),
) -> Labels:
    """The model's class of every row.

    Args:
        by_position: class names of the data stand in the model's order, whatever they are.
        others: names that other splits have, where names are strings.

    Raises:
        InputError: a label that is missing, unknown to the model, ambiguous or out of range; the message names the
            row, or both sides' classes.
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
        labels, warning = _from_strings(values, model, column, split, others)
    elif isinstance(feature, Value) and feature.dtype == "bool":
        labels = _from_booleans(values, model)
    else:
        labels = _from_numbers(_whole_numbers(np.asarray(values), column, split), model, column, split)
    _check_range(labels, model.count, column, split)
    return Labels(labels, warning)


def label_names(rows: Dataset, column: str) -> set[str]:
    """The names of classes in a column of strings."""
    if not is_text(rows.features[column]):
        return set()
    return {
        value for value in rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist() if value
    }


class _ModelClasses:
    """The model's classes, to be found by name."""

    def __init__(self, model_config: PreTrainedConfig) -> None:
        self.count = class_count(model_config)
        # Some files have label2id the wrong way round; the model's outputs are ordered by id2label.
        self.names = class_names(model_config)
        self._by_name = _index((name, label) for label, name in self.names.items())
        parts = ((part, label) for label, name in self.names.items() for part in name.split(","))
        self._by_synonym = _index(parts)

    @property
    def shown(self) -> str:
        return listed(list(self.names.values()))

    @property
    def are_named(self) -> bool:
        """Whether names say more than numbers do: LABEL_0 or 0 does not."""
        return any(_folded(name) not in (f"label{i}", f"class{i}", str(i)) for i, name in self.names.items())

    @property
    def by_whole_number(self) -> dict[int, int]:
        """Class by the number that is its name, where numbers are the names and not just the positions."""
        if not self.are_named or not all(_WHOLE.fullmatch(name.strip()) for name in self.names.values()):
            return {}
        return {_whole(name): label for label, name in self.names.items()}

    def find(self, name: str, position: int | None = None) -> int | None:
        """The class of this name; None for none. ``position`` decides between classes that share the name.

        Raises:
            InputError: several have it.
        """
        parts = [part for part in name.split(",") if part.strip()]
        for found in (
            self._by_name.get(_folded(name), []),
            self._by_synonym.get(_folded(name), []),
            sorted({label for part in parts for label in self._by_synonym.get(_folded(part), [])}),
        ):
            if len(found) == 1:
                return found[0]
            if position is not None and position in found:
                return position
            if found:
                shown = ", ".join(f"{label} ({self.names[label]!r})" for label in found)
                raise InputError(
                    f"class {name!r} of the data may be any of the model's classes {shown}; write the number"
                )
        return _whole(name) if _WHOLE.fullmatch(name.strip()) else None

    def find_short(self, found: Sequence[tuple[str, int | None]]) -> list[int]:
        """The classes of all names, of which some were not found: those may be shortened, or long for the model's.
        None at all where a name may be of several classes, or a class has no name."""
        if not self.are_named or len(found) != self.count:
            return []
        near = [
            [at for at, full in self.names.items() if _is_shortened(name, full)] if own is None else [own]
            for name, own in found
        ]
        every = [labels[0] for labels in near if len(labels) == 1]
        return every if sorted(every) == sorted(self.names) else []


def _is_missing(value: object) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _is_shortened(name: str, full: str) -> bool:
    """Whether one starts with the other, or with one of its synonyms."""
    for synonym in full.split(","):
        short, long = sorted((_folded(name), _folded(synonym)), key=len)
        if len(short) >= _SHORTEST and long.startswith(short):
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
    values: np.ndarray, names: Sequence[str], model: _ModelClasses, column: str, by_position: bool
) -> tuple[np.ndarray, str | None]:
    if by_position:
        if len(names) > model.count:
            raise InputError(
                f"--labels-by-position: column {column!r} has {len(names)} classes, the model {model.count}"
            )
        return values, _by_position(names, model, "as asked")
    found = [model.find(name, position) for position, name in enumerate(names)]
    strange = [position for position, label in enumerate(found) if label is None]
    same_order = len(names) == model.count and all(label in (None, at) for at, label in enumerate(found))
    if strange and same_order and not model.are_named:
        return values, _by_position(names, model, "since the model's classes have no names")
    if strange and same_order and len(names) - len(strange) >= _SAME_LIST * len(names):
        return values, _by_position(
            [names[at] for at in strange], model, "since all other classes have the model's order", strange
        )
    warning = None
    if strange and (labels := model.find_short(list(zip(names, found, strict=True)))):
        found, strange, warning = list(labels), [], _shortened(names, labels, model)
    used = [position for position in strange if (values == position).any()]
    if used:
        raise InputError(_unknown([names[at] for at in used], len(names), model, f"column {column!r}"))
    table = np.asarray([_UNKNOWN if label is None else label for label in found])
    return np.where(values < 0, values, table[np.clip(values, 0, None)]), warning


def _shortened(names: Sequence[str], labels: Sequence[int], model: _ModelClasses) -> str:
    every = zip(names, labels, strict=True)
    pairs = [(name, label) for name, label in every if _folded(name) != _folded(model.names[label])]
    return f"classes of the data were taken for those of the model that start alike: {_shown(pairs, model)}"


def _by_position(names: Sequence[str], model: _ModelClasses, why: str, at: Sequence[int] | None = None) -> str:
    positions = range(len(names)) if at is None else at
    shown = _shown(list(zip(names, positions, strict=True)), model)
    return f"classes of the data were taken by position, {why}: {shown}"


def _shown(pairs: Sequence[tuple[str, int]], model: _ModelClasses) -> str:
    words = [f"{name!r} is {label} ({model.names.get(label, label)!r})" for name, label in pairs[:6]]
    return ", ".join(words) + (f" and {len(pairs) - 6} more" if len(pairs) > 6 else "")


def _unknown(names: Sequence[str], count: int, model: _ModelClasses, place: str) -> str:
    if model.are_named:
        known = f"whose classes are {model.shown}"
    else:
        known = f"whose {model.count} classes have no names, and the data has {count}"
    return (
        f"classes {listed(names)} of {place} are unknown to the model, {known}; rename them, or put the data's names "
        f"into id2label of the model's config.json, or write the model's numbers (0 to {model.count - 1}) in their "
        "place; if both lists are in the same order, give --labels-by-position"
    )


def _from_strings(
    values: Sequence[str], model: _ModelClasses, column: str, split: str, others: Sequence[str]
) -> tuple[np.ndarray, str | None]:
    found, warning = {value: model.find(value) for value in dict.fromkeys([*values, *others])}, None
    if None in found.values() and (labels := model.find_short(list(found.items()))):
        warning = _shortened(list(found), labels, model)
        found = dict(zip(found, labels, strict=True))
    strange = next((row for row, value in enumerate(values) if found[value] is None), None)
    if strange is not None:
        names = "" if model.are_named else ", which say nothing of its meaning"
        raise InputError(
            f"row {strange} of {split} has label {values[strange]!r} in column {column!r}, which the model does not "
            f"know; its classes are {model.shown}{names}; write these names or their numbers (0 to {model.count - 1}), "
            "or put the data's names into id2label of the model's config.json"
        )
    return np.asarray([found[value] for value in values], np.int64), warning


def _from_booleans(values: Sequence[bool], model: _ModelClasses) -> np.ndarray:
    named = {value: model.find(str(value)) for value in (False, True)}
    return np.asarray([int(value) if None in named.values() else named[value] for value in values], np.int64)


def _whole_numbers(values: np.ndarray, column: str, split: str) -> np.ndarray:
    """Tables with a gap somewhere, and some exports, have 1.0 for 1."""
    whole = values.astype(np.int64)
    wrong = np.flatnonzero(whole != values)
    if wrong.size:
        raise InputError(
            f"row {wrong[0]} of {split} has label {values[wrong[0]]} in column {column!r}, which is no class: "
            "classes are whole numbers or names"
        )
    return whole


def _from_numbers(values: np.ndarray, model: _ModelClasses, column: str, split: str) -> np.ndarray:
    by_name = model.by_whole_number
    if not by_name or not all(value in by_name for value in values.tolist()):
        return values
    named = np.asarray([by_name[value] for value in values.tolist()], np.int64)
    if ((values >= 0) & (values < model.count)).all() and (named != values).any():
        raise InputError(
            f"the numbers in column {column!r} of {split} may be the model's classes (0 to {model.count - 1}) or their "
            f"names ({model.shown}); write them as names in words, in the data and in id2label of config.json"
        )
    return named


def _whole(text: str) -> int:
    return int(text.strip().split(".")[0])


def _folded(name: str) -> str:
    """Without case and separators, whichever way its accents are written; numbers keep their sign."""
    name = unicodedata.normalize("NFKC", name).strip().casefold()
    return name if _WHOLE.fullmatch(name) else re.sub(r"[\s_-]+", "", name) or name
