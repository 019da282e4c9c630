"""This package's Markdown templates, filled in: what is filled in is text, whatever it looks like.

Models, data, devices and files bear names that others gave them: one with a pipe would break a table, one with brackets
become a link. So every value is escaped on its way in; a filter that makes Markdown, YAML or a shell's word of a value
says so by its type.
"""

import json
import re
import shlex
from collections.abc import Iterable
from typing import Any

import jinja2

from converters.onnx.modes import FILE_NAMES
from prehab_export.system.terminal import printable


def render(room: str, template: str, facts: dict[str, Any]) -> str:
    """A template of a room (``pipeline``), filled in; a fact that is missing is an error, not a gap."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(f"prehab_export.{room}"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_finished,
    )
    environment.globals["file_names"] = FILE_NAMES
    environment.filters |= {"metric": _metric, "count": _count, "share": lambda x: f"{100 * x:.1f}%", "mb": _megabytes}
    environment.filters |= {"cells": _cells, "code": code_span, "yaml": _yaml, "shell": _shell_word}
    return environment.get_template(template).render(facts)


class Finished(str):
    """Text that needs no escaping any more."""


def _finished(value: Any) -> Any:
    """What a template puts out for a value; an undefined one raises."""
    return value if isinstance(value, Finished | int | float) else Finished(escape_markdown(str(value)))


# Signs that mean something wherever they stand; an underscore within a word does not, an ampersand only in an entity.
_MARKS = re.compile(r"[\\`*\[\]<>|~#$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
# What makes a list or a heading of a line that begins with it.
_STARTS = re.compile(r"^(?:[-+=](?=\s|[-=]|$)|\d+(?=[.)](?:\s|$)))")


def escape_markdown(text: str) -> str:
    r"""Text as Markdown (CommonMark, with GitHub's tables) that shows just this text, in one line.

    >>> print(escape_markdown("x[/v2]|*a*"))
    x\[/v2\]\|\*a\*
    >>> print(escape_markdown("layer_1 of 2. it"), escape_markdown("2. it"))
    layer_1 of 2. it 2\. it
    """
    line = _MARKS.sub(r"\\\g<0>", _one_line(text))
    start = _STARTS.match(line)
    if start is None:
        return line
    return f"{line[: start.end()]}\\{line[start.end() :]}" if start[0].isdecimal() else f"\\{line}"


def code_span(text: str) -> Finished:
    """Text as a code span, in which only the backticks around it and a table's pipes mean anything.

    >>> print(code_span("a`b|c"))
    `` a`b\\|c ``
    """
    line = _one_line(text).replace("|", "\\|")
    runs = re.findall("`+", line)
    fence = "`" * (1 + max(map(len, runs), default=0))
    return Finished(f"{fence} {line} {fence}" if runs else f"`{line}`")


def _one_line(text: str) -> str:
    return " ".join(printable(text.encode("utf-8", "backslashreplace").decode("utf-8")).split())


def _cells(values: Iterable[str]) -> Finished:
    """The inner of a table's row."""
    return Finished(" | ".join(escape_markdown(value) for value in values))


def _yaml(text: str) -> Finished:
    """A string in YAML; JSON's are YAML's."""
    return Finished(text if re.fullmatch(r"[A-Za-z][\w.-]*(/[\w.-]+)?", text) else json.dumps(text))


def _shell_word(text: str) -> Finished:
    return Finished(shlex.quote(_one_line(text)))


def _metric(value: float) -> str:
    return f"{value:.4f}" if value < 10 else f"{value:.2f}"


def _count(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value >= 1e5 else f"{value:,.0f}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.2f} MB"
