"""Options to and from YAML and plain mappings."""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from converters.errors import InputError
from prehab_export.config.checks import AUTO
from prehab_export.config.keys import known_keys, sections, unknown
from prehab_export.config.run import RunConfig

# Type → what a value of it is called.
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}

T = TypeVar("T")


def to_yaml(config: RunConfig) -> str:
    """The options as a YAML document that `read_options` reads back."""
    import yaml

    return yaml.safe_dump(plain_options(config), sort_keys=False, allow_unicode=True)


def plain_options(config: RunConfig) -> dict[str, Any]:
    """The options as JSON types, in the shape of a YAML file."""
    return json.loads(json.dumps(asdict(config)))  # tuples become lists


def read_options(path: Path) -> dict[str, Any]:
    """Some options or all of them, from a YAML file in the shape of a saved ``run.yaml``.

    Raises:
        InputError: no YAML, or as `checked_options`; the file is named.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(values, Mapping):
        raise InputError(f"{path} holds no options; its shape is that of a saved run.yaml")
    return checked_options(values, str(path))


def read_setting(text: str) -> tuple[str, Any]:
    """One option given as ``KEY=VALUE``: its full name, and its value, read as YAML.

    >>> read_setting("truncate.floor_share=0.2"), read_setting("bench.batch_sizes=[1, 8]")
    (('truncate.floor_share', 0.2), ('bench.batch_sizes', (1, 8)))

    Raises:
        InputError: no ``=``, an unknown name, a section's name, or a value of the wrong kind.
    """
    path, given, written = text.partition("=")
    path = path.strip()
    if not given:
        raise InputError(f"{text!r} sets nothing: give KEY=VALUE, such as truncate.floor_share=0.2")
    if path in sections():
        inside = next(key for key in known_keys() if key.startswith(f"{path}."))
        raise InputError(f"{path} is a section: set its options one by one, such as {inside}=VALUE")
    if path not in known_keys():
        raise unknown(path)
    kind = known_keys()[path].kind
    return path, _converted(kind, _read(kind, written.strip()), path, "")


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a config from nested mappings, the inverse of ``dataclasses.asdict``.

    >>> from_dict(RunConfig, {"model": "m", "task": "text-generation", "data": {"data": "d"}}).truncate.ratio
    0.6

    Raises:
        InputError: as `checked_options`; or a value that must be given is not, or is out of range.
    """
    return _made(cls, _checked(cls, values, cls, "", ""))


def checked_options(values: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """The same options, some or all, with each value as its field has it; what is not given stays so.

    >>> checked_options({"truncate": {"ratio": "1e-1"}, "quantize": "int8"})
    {'truncate': {'ratio': 0.1}, 'quantize': ('int8',)}

    Args:
        source: where they come from, for messages.

    Raises:
        InputError: an unknown name, with the nearest known one, or a value of the wrong kind, with its place.
    """
    return _checked(RunConfig, values, RunConfig, "", source)


def _checked(root: type, values: Any, cls: type, where: str, source: str) -> dict[str, Any]:
    if values is None and where:  # a section of which every line is commented out
        return {}
    if not isinstance(values, Mapping):
        place = where.rstrip(".") or "the options"
        raise InputError(f"{place}{_in(source)}: expected a section with keys, found {values!r}")
    kinds = get_type_hints(cls)
    for name in values:
        if name not in kinds:
            raise unknown(f"{where}{name}", root, source)
    return {
        name: _checked(root, value, kinds[name], f"{where}{name}.", source)
        if is_dataclass(kinds[name])
        else _converted(kinds[name], value, f"{where}{name}", source)
        for name, value in values.items()
    }


def _made(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    kinds, keys = get_type_hints(cls), known_keys(cast(type, cls))
    for key in keys.values():
        section = key.path.partition(".")[0]
        if key.required and section not in values:
            raise InputError(f"{where}{key.path} is not given")
    return cls(
        **{
            name: _made(kinds[name], value, f"{where}{name}.") if is_dataclass(kinds[name]) else value
            for name, value in values.items()
        }
    )


def _converted(kind: Any, value: Any, where: str, source: str) -> Any:
    if get_origin(kind) is UnionType:
        first, second = get_args(kind)
        if value is None and second is NoneType:
            return None
        return value if value == AUTO and second is str else _converted(first, value, where, source)
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_converted(get_args(kind)[0], item, where, source) for item in items)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            pass
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{where}{_in(source)}: expected {NAMES[kind]}, found {value!r}")
    return value


def _read(kind: Any, text: str) -> Any:
    """A value as it stands on a command line, read as YAML; where text is asked for, it needs no quotes."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # a pattern such as *.mlp.*
    plain = get_args(kind) if get_args(kind) else (kind,)
    is_text = plain[0] is str and not isinstance(value, str | list | NoneType)
    return text if is_text else value


def _in(source: str) -> str:
    return f" in {source}" if source else ""
