"""Every option by its full name: ``truncate.ratio``, its type, its default and what it means.

The names, types and defaults are those of the dataclasses; the meanings stand in their docstrings, as ``field: text``
with further lines indented.
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

    path: its full name. kind: its type, as annotated. default: what it is when not given; None also where that is found
    at run time. required: whether it must be given. meaning: what it is, in a phrase.
    """

    path: str
    kind: Any
    default: Any
    required: bool
    meaning: str


@cache
def known_keys(cls: type = RunConfig) -> dict[str, Key]:
    """Full name → option, of every option under ``cls``, in the order of its fields.

    >>> known_keys()["truncate.ratio"].default
    0.6
    """
    return {key.path: key for key in _walk(cls, "")}


@cache
def sections(cls: type = RunConfig) -> dict[str, str]:
    """Full name → what it is about, of every section under ``cls``; the outermost has no name.

    >>> sections()["truncate"]
    'How to truncate'
    """
    found = {"": _title(cls)}
    for name, kind in get_type_hints(cls).items():
        if is_dataclass(kind):
            inside = sections(kind)  # type: ignore[arg-type]
            found |= {f"{name}.{inner}".rstrip("."): text for inner, text in inside.items()}
    return found


def unknown(name: str, cls: type = RunConfig, source: str = "") -> InputError:
    """The error for a name that no option has, with the nearest that there is.

    >>> print(unknown("truncate.ration"))
    unknown option truncate.ration; did you mean truncate.ratio?

    Args:
        source: where it was found, for the sentence.
    """
    near = nearest(name, cls)
    advice = f"did you mean {near}?" if near else "`prehab-export options` lists those that there are"
    return InputError(f"unknown option {name}{f' in {source}' if source else ''}; {advice}")


def nearest(name: str, cls: type = RunConfig) -> str | None:
    """The option or section that somebody may have meant; None where nothing is like it.

    >>> nearest("ratio"), nearest("prehab.refresh-every"), nearest("zzz")
    ('truncate.ratio', 'prehab.refresh_every', None)
    """
    known = [*known_keys(cls), *(section for section in sections(cls) if section)]
    spelled = name.replace("-", "_")
    if same_end := [path for path in known if path.endswith(f".{spelled}")]:
        return difflib.get_close_matches(name, same_end, n=1, cutoff=0)[0]
    if near := difflib.get_close_matches(spelled, known, n=1, cutoff=0.75):
        return near[0]
    ends = {path.rpartition(".")[2]: path for path in reversed(known)}
    near = difflib.get_close_matches(spelled.rpartition(".")[2], ends, n=1, cutoff=0.75)
    return ends[near[0]] if near else None


def _walk(cls: type, prefix: str) -> Iterator[Key]:
    kinds, meanings = get_type_hints(cls), _meanings(cls)
    for entry in fields(cls):
        kind, path = kinds[entry.name], f"{prefix}{entry.name}"
        if is_dataclass(kind):
            yield from _walk(kind, f"{path}.")  # type: ignore[arg-type]
        else:
            required, default = _default(entry)
            yield Key(path, kind, default, required, meanings.get(entry.name, ""))


def _default(entry: "Field[Any]") -> tuple[bool, Any]:
    """Whether a field must be given, and what it is when it is not."""
    if entry.default is not MISSING:
        return False, entry.default
    if entry.default_factory is not MISSING:
        return False, entry.default_factory()
    return True, None


def _title(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ").removesuffix(".")


def _meanings(cls: type) -> dict[str, str]:
    """Field → its text, from the docstrings of a dataclass and of those that it extends."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        lines = inspect.cleandoc(base.__doc__ or "").splitlines() if is_dataclass(base) else []
        name = None
        for line in lines:
            if entry := re.match(r"(\w+): (.+)", line):
                name, found[entry[1]] = entry[1], entry[2]
            elif name is not None and line.startswith(" "):
                found[name] += f" {line.strip()}"
            else:
                name = None
    return {name: text.replace("``", "").removesuffix(".") for name, text in found.items()}
