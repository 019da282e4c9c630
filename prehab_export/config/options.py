"""Conversion of options to and from YAML and nested mappings."""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from converters.errors import InputError
from prehab_export.config.checks import AUTO
from prehab_export.config.keys import known_keys, sections, unknown_option
from prehab_export.config.run import RunConfig

# What messages call a value of each type.
TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}

T = TypeVar("T")


def to_yaml(config: RunConfig) -> str:
    """Return the options as a YAML document that `read_options` can read."""
    import yaml

    return yaml.safe_dump(plain_options(config), sort_keys=False, allow_unicode=True)


def plain_options(config: RunConfig) -> dict[str, Any]:
    """Return the options as nested JSON types, structured like a YAML file."""
    return json.loads(json.dumps(asdict(config)))  # tuples become lists


def read_options(path: Path) -> dict[str, Any]:
    """Read some or all options from a YAML file structured like a saved ``run.yaml``.

    Raises:
        InputError: the file cannot be read, is not YAML, or holds a name or value that `checked_options` rejects.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(values, Mapping):
        raise InputError(f"{path} holds no options; write it in the form of a saved run.yaml")
    return checked_options(values, str(path))


def read_setting(text: str) -> tuple[str, Any]:
    """Parse ``KEY=VALUE`` and return the option's full name and its value, read as YAML.

    >>> read_setting("truncate.floor_share=0.2"), read_setting("bench.batch_sizes=[1, 8]")
    (('truncate.floor_share', 0.2), ('bench.batch_sizes', (1, 8)))

    Raises:
        InputError: ``=`` is missing, the name is unknown or a section, or the value has the wrong type.
    """
    path, separator, value_text = text.partition("=")
    path = path.strip()
    if not separator:
        raise InputError(f"{text!r} sets nothing: give KEY=VALUE, such as truncate.floor_share=0.2")
    if path in sections():
        example = next(key for key in known_keys() if key.startswith(f"{path}."))
        raise InputError(f"{path} is a section: set its options one by one, such as {example}=VALUE")
    if path not in known_keys():
        raise unknown_option(path)
    kind = known_keys()[path].kind
    return path, _convert(kind, _parse_value(kind, value_text.strip()), path, "")


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a config dataclass from nested mappings. This is the inverse of ``dataclasses.asdict``.

    >>> from_dict(RunConfig, {"model": "m", "task": "text-generation", "data": {"data": "d"}}).truncate.ratio
    0.6

    Raises:
        InputError: a name or value is one that `checked_options` rejects, a required option is missing, or a value is
            out of range.
    """
    return _build(cls, _check(cls, values, cls, "", ""))


def checked_options(values: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """Check some or all options, and convert each value to the type of its field. No defaults are filled in.

    >>> checked_options({"truncate": {"ratio": "1e-1"}, "quantize": "int8"})
    {'truncate': {'ratio': 0.1}, 'quantize': ('int8',)}

    Args:
        source: where the options come from, such as a file, for messages.

    Raises:
        InputError: a name is unknown, or a value has the wrong type.
    """
    return _check(RunConfig, values, RunConfig, "", source)


def _check(root: type, values: Any, cls: type, prefix: str, source: str) -> dict[str, Any]:
    if values is None and prefix:  # YAML reads a section whose lines are all commented out as None
        return {}
    if not isinstance(values, Mapping):
        section = prefix.rstrip(".") or "the options"
        raise InputError(f"{section}{_in(source)}: expected a section with keys, found {values!r}")
    kinds = get_type_hints(cls)
    for name in values:
        if name not in kinds:
            raise unknown_option(f"{prefix}{name}", root, source)
    return {
        name: _check(root, value, kinds[name], f"{prefix}{name}.", source)
        if is_dataclass(kinds[name])
        else _convert(kinds[name], value, f"{prefix}{name}", source)
        for name, value in values.items()
    }


def _build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    kinds, keys = get_type_hints(cls), known_keys(cast(type, cls))
    for key in keys.values():
        section = key.path.partition(".")[0]
        if key.required and section not in values:
            raise InputError(f"{prefix}{key.path} is not given")
    return cls(
        **{
            name: _build(kinds[name], value, f"{prefix}{name}.") if is_dataclass(kinds[name]) else value
            for name, value in values.items()
        }
    )


def _convert(kind: Any, value: Any, path: str, source: str) -> Any:
    if get_origin(kind) is UnionType:
        first, second = get_args(kind)
        if value is None and second is NoneType:
            return None
        return value if value == AUTO and second is str else _convert(first, value, path, source)
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(get_args(kind)[0], item, path, source) for item in items)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            pass
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{path}{_in(source)}: expected {TYPE_NAMES[kind]}, found {value!r}")
    return value


def _parse_value(kind: Any, text: str) -> Any:
    """Parse a command-line value as YAML. The value of a text option needs no quotes."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # not YAML, such as the pattern *.mlp.*
    types = get_args(kind) if get_args(kind) else (kind,)
    is_text = types[0] is str and not isinstance(value, str | list | NoneType)
    return text if is_text else value


def _in(source: str) -> str:
    return f" in {source}" if source else ""
