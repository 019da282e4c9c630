"""Render Markdown templates, with every value escaped as plain text.

Models, data sets, devices and files have names chosen by others: a pipe in a name would break a table, and brackets
would make it a link. So every value is escaped when it is inserted. A filter that already returns Markdown, YAML or a
shell word marks its result with the type `Finished`.
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
    """Render a template of a room (such as ``pipeline``); a missing fact raises an error instead of leaving a gap."""
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
    """Text that needs no more escaping."""


def _finished(value: Any) -> Any:
    """Convert a value to the template's output; an undefined value raises."""
    return value if isinstance(value, Finished | int | float) else Finished(escape_markdown(str(value)))


# Characters that are markup anywhere in a line. An underscore inside a word is not, and an ampersand only in an entity.
_MARKS = re.compile(r"[\\`*\[\]<>|~#$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
# Characters at the start of a line that make it a list or a heading.
_STARTS = re.compile(r"^(?:[-+=](?=\s|[-=]|$)|\d+(?=[.)](?:\s|$)))")


def escape_markdown(text: str) -> str:
    r"""Return one line of Markdown (CommonMark, with GitHub's tables) that displays exactly this text.

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
    """Return text as a code span, in which only backticks and a table's pipes need care.

    >>> print(code_span("a`b|c"))
    `` a`b\\|c ``
    """
    line = _one_line(text).replace("|", "\\|")
    runs = re.findall("`+", line)
    fence = "`" * (1 + max(map(len, runs), default=0))
    return Finished(f"{fence} {line} {fence}" if runs else f"`{line}`")


def _one_line(text: str) -> str:
    """The text in one line, printable and encodable in UTF-8."""
    return " ".join(printable(text.encode("utf-8", "backslashreplace").decode("utf-8")).split())


def _cells(values: Iterable[str]) -> Finished:
    """The cells of a table's row, without the outer pipes."""
    return Finished(" | ".join(escape_markdown(value) for value in values))


def _yaml(text: str) -> Finished:
    """A string in YAML; a JSON string is one, too."""
    return Finished(text if re.fullmatch(r"[A-Za-z][\w.-]*(/[\w.-]+)?", text) else json.dumps(text))


def _shell_word(text: str) -> Finished:
    return Finished(shlex.quote(_one_line(text)))


def _metric(value: float) -> str:
    return f"{value:.4f}" if value < 10 else f"{value:.2f}"


def _count(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value >= 1e5 else f"{value:,.0f}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.2f} MB"
