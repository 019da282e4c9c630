"""The table of all options, by full name (``truncate.ratio``): type, default and meaning.

Names, types and defaults come from the dataclasses. Meanings come from their docstrings, where each field has a line
``field: text`` whose continuation lines are indented.
"""

import difflib
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from converters.errors import InputError
from prehab_export.config.run import RunConfig


@dataclass(frozen=True)
class Key:
    """One option.

    path: full name. kind: annotated type. default: value when the option is not given; also None if that value is
    determined at run time. required: whether the option must be given. meaning: short description.
    """

    path: str
    kind: Any
    default: Any
    required: bool
    meaning: str


@cache
def known_keys(cls: type = RunConfig) -> dict[str, Key]:
    """Return every option under ``cls`` by full name, in the order of its fields.

    >>> known_keys()["truncate.ratio"].default
    0.6
    """
    return {key.path: key for key in _iterate_keys(cls, "")}


@cache
def sections(cls: type = RunConfig) -> dict[str, str]:
    """Return the title of every section under ``cls`` by full name. The outermost section has an empty name.

    >>> sections()["truncate"]
    'How to truncate'
    """
    titles = {"": _title(cls)}
    for name, kind in get_type_hints(cls).items():
        if is_dataclass(kind):
            inner_titles = sections(kind)  # type: ignore[arg-type]
            titles |= {f"{name}.{inner}".rstrip("."): title for inner, title in inner_titles.items()}
    return titles


def unknown_option(name: str, cls: type = RunConfig, source: str = "") -> InputError:
    """Return the error for a name that is not an option; it suggests the nearest option.

    >>> print(unknown_option("truncate.ration"))
    unknown option truncate.ration; did you mean truncate.ratio?

    Args:
        source: where the name was read from, such as a file, for the message.
    """
    suggestion = nearest(name, cls)
    advice = f"did you mean {suggestion}?" if suggestion else "`prehab-export options` lists all options"
    return InputError(f"unknown option {name}{f' in {source}' if source else ''}; {advice}")


def nearest(name: str, cls: type = RunConfig) -> str | None:
    """Return the option or section whose name is most like ``name``, or None if none is similar.

    >>> nearest("ratio"), nearest("prehab.refresh-every"), nearest("zzz")
    ('truncate.ratio', 'prehab.refresh_every', None)
    """
    paths = [*known_keys(cls), *(section for section in sections(cls) if section)]
    normalised = name.replace("-", "_")
    if suffix_matches := [path for path in paths if path.endswith(f".{normalised}")]:
        return difflib.get_close_matches(name, suffix_matches, n=1, cutoff=0)[0]
    if matches := difflib.get_close_matches(normalised, paths, n=1, cutoff=0.75):
        return matches[0]
    path_by_last_part = {path.rpartition(".")[2]: path for path in reversed(paths)}
    matches = difflib.get_close_matches(normalised.rpartition(".")[2], path_by_last_part, n=1, cutoff=0.75)
    return path_by_last_part[matches[0]] if matches else None


def _iterate_keys(cls: type, prefix: str) -> Iterator[Key]:
    kinds, meanings = get_type_hints(cls), _meanings(cls)
    for field in fields(cls):
        kind, path = kinds[field.name], f"{prefix}{field.name}"
        if is_dataclass(kind):
            yield from _iterate_keys(kind, f"{path}.")  # type: ignore[arg-type]
        else:
            required, default = _default(field)
            yield Key(path, kind, default, required, meanings.get(field.name, ""))


def _default(field: "Field[Any]") -> tuple[bool, Any]:
    """Return whether a field is required, and its default."""
    if field.default is not MISSING:
        return False, field.default
    if field.default_factory is not MISSING:
        return False, field.default_factory()
    return True, None


def _title(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ").removesuffix(".")


def _meanings(cls: type) -> dict[str, str]:
    """Return the description of each field, from the docstrings of a dataclass and its dataclass bases."""
    descriptions: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        lines = inspect.cleandoc(base.__doc__ or "").splitlines() if is_dataclass(base) else []
        name = None
        for line in lines:
            if match := re.match(r"(\w+): (.+)", line):
                name, descriptions[match[1]] = match[1], match[2]
            elif name is not None and line.startswith(" "):
                descriptions[name] += f" {line.strip()}"
            else:
                name = None
    return {name: text.replace("``", "").removesuffix(".") for name, text in descriptions.items()}
