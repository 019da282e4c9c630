"""Few shell-style patterns for many names."""

from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from glob import escape


def covering_patterns(names: Collection[str], others: Collection[str]) -> list[str]:
    """Patterns that between them match all of the dotted names and none of the others, as few as a greedy choice finds.

    >>> covering_patterns(["vision.layers.0.q", "vision.layers.1.q"], ["text.layers.0.q"])
    ['vision.*']
    >>> covering_patterns(["layers.0.dt", "layers.1.dt"], ["layers.0.x", "layers.1.x"])
    ['layers.*.dt']
    """
    allowed = {
        pattern: {name for name in names if fnmatchcase(name, pattern)}
        for pattern in dict.fromkeys(candidate for name in names for candidate in _candidates(name))
        if not any(fnmatchcase(other, pattern) for other in others)
    }
    left, chosen = set(names), []
    while left:
        best = min(allowed, key=lambda pattern: _rank(pattern, len(allowed[pattern] & left)))
        chosen.append(best)
        left -= allowed[best]
    return chosen


def _rank(pattern: str, matches: int) -> tuple[int, bool, bool, int]:
    """The most matches first; a single layer by its name; then what names a part of the model, and the shortest."""
    return -matches, matches == 1 and "*" in pattern, pattern.startswith("*"), len(pattern)


def exclude_options(names: Collection[str], others: Collection[str]) -> str:
    """The options of the command line that leave these layers out, and none of the others."""
    return " ".join(f"--exclude {pattern!r}" for pattern in covering_patterns(names, others))


def _candidates(name: str) -> Iterator[str]:
    """The name itself; what it begins with, what it ends with, and what is the same whatever its numbers are."""
    parts = escape(name).split(".")
    yield escape(name)
    for size in range(1, len(parts)):
        yield ".".join(parts[:size]) + ".*"
        yield "*." + ".".join(parts[size:])
    unnumbered = ["*" if part.isdecimal() else part for part in parts]
    for size in range(1, len(parts) + 1):
        yield ".".join(unnumbered[:size]) + (".*" if size < len(parts) else "")
