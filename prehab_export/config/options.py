"""Options to and from YAML and plain mappings."""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from converters.errors import InputError
from prehab_export.config.checks import AUTO
from prehab_export.config.run import RunConfig


def to_yaml(config: RunConfig) -> str:
    """The options as a YAML document that ``from_dict`` reads back."""
    import yaml

    plain = json.loads(json.dumps(asdict(config)))  # tuples become lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a config from nested mappings, the inverse of ``dataclasses.asdict``.

    >>> from prehab_export.config import TruncateConfig
    >>> from_dict(TruncateConfig, {"ratio": 0.5}).ratio
    0.5

    Raises:
        InputError: an unknown key, a missing one, or a value of the wrong kind, with its place.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where or 'the options'}: expected a section with keys, found {values!r}")
    kinds = get_type_hints(cls)
    if unknown := sorted(set(values) - set(kinds)):
        raise InputError(f"unknown option {where}{unknown[0]}; known here: {', '.join(kinds)}")
    try:
        return cls(**{key: _converted(kinds[key], value, f"{where}{key}") for key, value in values.items()})
    except TypeError as error:
        raise InputError(f"{where or 'the options'}: {str(error).split('() ')[-1]}") from error


def _number(value: int | str, where: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise InputError(f"{where}: expected a number, found {value!r}") from error


def _converted(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        return from_dict(kind, value, f"{where}.")  # type: ignore[arg-type]
    if get_origin(kind) is UnionType:
        first, second = get_args(kind)
        if value is None and second is type(None):
            return None
        return value if value == AUTO and second is str else _converted(first, value, where)
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_converted(get_args(kind)[0], item, where) for item in items)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        return _number(value, where)  # YAML reads 1e-4 as a string
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{where}: expected {kind.__name__}, found {value!r}")
    return value
