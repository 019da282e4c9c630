"""Options as nested mappings, which is what a YAML file holds: reading, setting, taking out, merging and comparing them
by full name (``truncate.ratio``). Nothing is changed in place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """An option that has another value than before; None where there is none."""

    path: str
    before: Any
    after: Any


def value_at(values: Tree, path: str) -> Any:
    """One option; None where it is not there.

    >>> value_at({"truncate": {"ratio": 0.5}}, "truncate.ratio"), value_at({}, "truncate.ratio")
    (0.5, None)
    """
    inner: Any = values
    for name in path.split("."):
        inner = inner.get(name) if isinstance(inner, Mapping) else None
    return inner


def with_value(values: Tree, path: str, value: Any) -> dict[str, Any]:
    """The options with this one set.

    >>> with_value({"truncate": {"ratio": 0.5}}, "truncate.budget", "latency:0.5")
    {'truncate': {'ratio': 0.5, 'budget': 'latency:0.5'}}
    """
    head, _, rest = path.partition(".")
    inner = values.get(head)
    changed = with_value(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value
    return {**values, head: changed}


def without(values: Tree, path: str) -> dict[str, Any]:
    """The options without this one, or without all of a section; as they are where it is not there.

    >>> without({"truncate": {"ratio": 0.5, "budget": "parameters"}}, "truncate.budget")
    {'truncate': {'ratio': 0.5}}
    >>> without({"truncate": {"ratio": 0.5}, "seed": 1}, "truncate")
    {'seed': 1}
    """
    head, _, rest = path.partition(".")
    if not rest:
        return {name: value for name, value in values.items() if name != head}
    inner = values.get(head)
    return {**values, head: without(inner, rest)} if isinstance(inner, Mapping) else dict(values)


def merged(base: Tree, over: Tree) -> dict[str, Any]:
    """Both, section by section; ``over`` wins.

    >>> merged({"truncate": {"ratio": 0.5, "budget": "parameters"}}, {"truncate": {"ratio": 0.8}})
    {'truncate': {'ratio': 0.8, 'budget': 'parameters'}}
    """
    result = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both else value
    return result


def flat(values: Tree) -> dict[str, Any]:
    """Full name → value, of everything that is no section.

    >>> flat({"seed": 1, "truncate": {"ratio": 0.5}})
    {'seed': 1, 'truncate.ratio': 0.5}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = flat(value) if isinstance(value, Mapping) else None
        found |= {name: value} if inner is None else {f"{name}.{key}": item for key, item in inner.items()}
    return found


def differences(before: Tree, after: Tree) -> list[Difference]:
    """What is not the same in both, by full name; a list and a tuple of the same values are the same.

    >>> differences({"seed": 1, "truncate": {"ratio": 0.6}}, {"seed": 1, "truncate": {"ratio": 0.8}})
    [Difference(path='truncate.ratio', before=0.6, after=0.8)]
    """
    old, new = flat(before), flat(after)
    pairs = ((path, old.get(path), new.get(path)) for path in {**new, **old})
    return [Difference(path, was, now) for path, was, now in pairs if _plain(was) != _plain(now)]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
