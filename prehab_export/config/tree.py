"""Operations on options as nested mappings, the form that they have in a YAML file.

Functions address an option by its full name (``truncate.ratio``). No function changes its arguments.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """An option whose value has changed. A value is None if the option is missing on that side."""

    path: str
    before: Any
    after: Any


def value_at(values: Tree, path: str) -> Any:
    """Return the value of an option, or None if it is missing.

    >>> value_at({"truncate": {"ratio": 0.5}}, "truncate.ratio"), value_at({}, "truncate.ratio")
    (0.5, None)
    """
    value: Any = values
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def with_value(values: Tree, path: str, value: Any) -> dict[str, Any]:
    """Return the options with one of them set.

    >>> with_value({"truncate": {"ratio": 0.5}}, "truncate.budget", "latency:0.5")
    {'truncate': {'ratio': 0.5, 'budget': 'latency:0.5'}}
    """
    head, _, tail = path.partition(".")
    inner = values.get(head)
    new_value = with_value(inner if isinstance(inner, Mapping) else {}, tail, value) if tail else value
    return {**values, head: new_value}


def without(values: Tree, path: str) -> dict[str, Any]:
    """Return the options without one option or section. A missing path changes nothing.

    >>> without({"truncate": {"ratio": 0.5, "budget": "parameters"}}, "truncate.budget")
    {'truncate': {'ratio': 0.5}}
    >>> without({"truncate": {"ratio": 0.5}, "seed": 1}, "truncate")
    {'seed': 1}
    """
    head, _, tail = path.partition(".")
    if not tail:
        return {name: value for name, value in values.items() if name != head}
    inner = values.get(head)
    return {**values, head: without(inner, tail)} if isinstance(inner, Mapping) else dict(values)


def merged(base: Tree, overrides: Tree) -> dict[str, Any]:
    """Merge two sets of options section by section; ``overrides`` takes precedence.

    >>> merged({"truncate": {"ratio": 0.5, "budget": "parameters"}}, {"truncate": {"ratio": 0.8}})
    {'truncate': {'ratio': 0.8, 'budget': 'parameters'}}
    """
    result = dict(base)
    for name, value in overrides.items():
        are_sections = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if are_sections else value
    return result


def flat(values: Tree) -> dict[str, Any]:
    """Return the values of all options by full name.

    >>> flat({"seed": 1, "truncate": {"ratio": 0.5}})
    {'seed': 1, 'truncate.ratio': 0.5}
    """
    options: dict[str, Any] = {}
    for name, value in values.items():
        inner = flat(value) if isinstance(value, Mapping) else None
        options |= {name: value} if inner is None else {f"{name}.{key}": item for key, item in inner.items()}
    return options


def differences(before: Tree, after: Tree) -> list[Difference]:
    """Return the options whose values differ. A list equals a tuple of the same values.

    >>> differences({"seed": 1, "truncate": {"ratio": 0.6}}, {"seed": 1, "truncate": {"ratio": 0.8}})
    [Difference(path='truncate.ratio', before=0.6, after=0.8)]
    """
    old, new = flat(before), flat(after)
    pairs = ((path, old.get(path), new.get(path)) for path in {**new, **old})
    return [
        Difference(path, old_value, new_value)
        for path, old_value, new_value in pairs
        if _as_list(old_value) != _as_list(new_value)
    ]


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
