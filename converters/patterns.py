"""Find a few shell-style patterns that match many names."""

from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from glob import escape


def covering_patterns(names: Collection[str], others: Collection[str]) -> list[str]:
    """Find patterns that together match all dotted names and none of the others, as few as a greedy search finds.

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
    unmatched, chosen = set(names), []
    while unmatched:
        best = min(allowed, key=lambda pattern: _preference(pattern, len(allowed[pattern] & unmatched)))
        chosen.append(best)
        unmatched -= allowed[best]
    return chosen


def _preference(pattern: str, matches: int) -> tuple[int, bool, bool, int]:
    """A sort key: most matches first; for a single match its plain name; then patterns that begin with a part of the
    model; then the shortest."""
    return -matches, matches == 1 and "*" in pattern, pattern.startswith("*"), len(pattern)


def exclude_options(names: Collection[str], others: Collection[str]) -> str:
    """Return the command-line options that exclude these layers and none of the others."""
    return " ".join(f"--exclude {pattern!r}" for pattern in covering_patterns(names, others))


def _candidates(name: str) -> Iterator[str]:
    """The name itself, its beginnings, its endings, and its beginnings with every number replaced by ``*``."""
    parts = escape(name).split(".")
    yield escape(name)
    for size in range(1, len(parts)):
        yield ".".join(parts[:size]) + ".*"
        yield "*." + ".".join(parts[size:])
    unnumbered = ["*" if part.isdecimal() else part for part in parts]
    for size in range(1, len(parts) + 1):
        yield ".".join(unnumbered[:size]) + (".*" if size < len(parts) else "")
