"""The list of options on the terminal."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from converters.errors import InputError
from prehab_export.cli.options import FLAGS, capitalise
from prehab_export.config import Key, known_keys, sections

Row = dict[str, Any]


def option_facts(words: Sequence[str] = ()) -> list[Row]:
    """Return the name, default, flag and meaning of every option that contains all the words.

    Raises:
        InputError: no option contains all the words.
    """
    flags = {flag.path: f"--{flag.names[0]}" for flag in FLAGS} | {"model": "MODEL"}
    rows = [_row(key, flags.get(key.path)) for key in known_keys().values()]
    matches = [row for row in rows if all(word.lower() in f"{row}".lower() for word in words)]
    if not matches:
        raise InputError(f"no option contains {' and '.join(words)}; leave out the words to list all options")
    return matches


def _row(key: Key, flag: str | None) -> Row:
    facts = {name: value for name, value in asdict(key).items() if name != "kind"}
    return {**facts, "default": list(key.default) if isinstance(key.default, tuple) else key.default, "flag": flag}


def print_options(rows: Sequence[Row]) -> None:
    """Print the options on stdout by section, each with its meaning below its name."""
    formatter = click.HelpFormatter(width=min(110, click.get_current_context().terminal_width or 110))
    for section, title in sections().items():
        cells = [_cells(row) for row in rows if row["path"].rpartition(".")[0] == section]
        if cells:
            with formatter.section(f"{section}: {title}" if section else title):
                formatter.write_dl(cells, col_max=40)
    click.echo(formatter.getvalue().strip("\n"))


def _cells(row: Row) -> tuple[str, str]:
    text = f"{capitalise(row['meaning'])}."
    if not row["required"] and row["default"] not in (None, []):
        default = row["default"]
        text += f"  [default: {' '.join(map(str, default)) if isinstance(default, list) else _format_yaml(default)}]"
    return row["path"], f"{text}  ({row['flag']})" if row["flag"] else text


def _format_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
