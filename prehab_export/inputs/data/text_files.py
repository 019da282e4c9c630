"""Checks text files before they are read: their encoding, the delimiter of columns, and whether there is a header."""

import codecs
import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from converters.errors import InputError
from prehab_export.config import DataConfig
from prehab_export.inputs.data.columns import INDEX_NAMES, LABEL_NAMES, PAIR_NAMES, TEXT_NAMES

# Readers of `datasets` that decode text; UTF-8 is read without its byte order mark.
TEXT_READERS = ("csv", "json", "text")
UTF_8 = "utf-8-sig"
DELIMITERS = (",", ";", "\t", "|")
_ROWS = 1000
_HEAD = 1 << 16
_ZEROS = 0.5  # least share of zeros among the upper bytes of text that is mostly Latin
_PACKED = (b"\x1f\x8b", b"PK", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # what `datasets` unpacks by itself
_CHARACTERS = 1 << 20
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# Names that are common in headers and rare in rows.
_USUAL_NAMES = frozenset((*TEXT_NAMES, *LABEL_NAMES, *INDEX_NAMES, *(name for pair in PAIR_NAMES for name in pair)))
_SENTENCE_WORDS = 5


def reader_options(reader: str, config: DataConfig) -> dict[str, Any]:
    """Return the options for a reader of `datasets`.

    Raises:
        InputError: the configuration has an option that does not apply to such files.
    """
    for option, value, readers in (
        ("--encoding", config.encoding, TEXT_READERS),
        ("--delimiter", config.delimiter, ("csv",)),
        ("--header", config.header, ("csv",)),
    ):
        if value is not None and reader not in readers:
            raise InputError(f"{option} is for {' and '.join(readers)} files; {config.data} is read as {reader}")
    options: dict[str, Any] = {}
    if reader in TEXT_READERS:
        options["encoding"] = encoding_of(config)
    if reader == "text":
        options["keep_linebreaks"] = True  # line breaks are part of the text
    if reader == "csv":
        options["keep_default_na"] = False  # a cell with the word "null" is not empty
        if config.delimiter is not None:
            options["sep"] = config.separator
    return options


def encoding_of(config: DataConfig) -> str:
    """Return the encoding to read with; UTF-8 always skips a byte order mark."""
    name = config.encoding
    return UTF_8 if name is None or codecs.lookup(name).name == "utf-8" else name


def check_text(files: Iterable[Path], reader: str, config: DataConfig) -> None:
    """Refuse files that decode without an error but are not UTF-8 text.

    Text with two bytes per letter, for example, decodes as letters and zeros.

    Raises:
        InputError: a file contains zero bytes.
    """
    if reader not in TEXT_READERS or config.encoding is not None:
        return
    for path in files:
        try:
            with path.open("rb") as file:
                head = file.read(_HEAD)
        except OSError:  # the reader reports it
            continue
        likely = guess_encoding(head)
        if likely is not None:
            raise InputError(f"{path} is not UTF-8 text; give its encoding, as in --encoding {likely}")
        if b"\0" in head and not head.startswith(_PACKED):
            raise InputError(f"{path} holds zero bytes, which text does not; remove them, or give its --encoding")


def guess_encoding(head: bytes) -> str | None:
    """Guess the encoding of text with two or four bytes per letter, from its byte order mark or where its zeros are."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) < _ZEROS * (len(head) // 2) or min(even, odd) > 0:
        return None
    return ("utf-16-le" if odd else "utf-16-be") if len(head) > 1 else None


def table_options(files: Iterable[Path], delimiter: str, config: DataConfig) -> dict[str, Any]:
    """Return the options for reading these csv files, after a check of the first rows of each.

    Raises:
        InputError: a file has another delimiter, or its first row is not a header.
    """
    width = 0
    for path in files:
        table = _head(path, delimiter, encoding_of(config))
        if table is None:
            continue
        if config.delimiter is None:
            _check_delimiter(path, table, delimiter)
        if config.header is None:
            _check_header(path, table, config)
        width = max(width, len(table.rows[0]))
    return {"names": [f"column{index + 1}" for index in range(width)]} if config.header is False else {}


@dataclass(frozen=True)
class _Table:
    """The start of a table: its lines as in the file, and the same lines split into fields."""

    lines: list[str]
    rows: list[list[str]]


def _head(path: Path, delimiter: str, encoding: str) -> _Table | None:
    """Return the first rows of a table; None if they cannot be read, which the reader of `datasets` reports better."""
    try:
        with path.open(encoding=encoding, errors="replace", newline="") as file:
            lines = file.read(_CHARACTERS).splitlines(keepends=True)
            if file.read(1):
                lines = lines[:-1]
        rows = _split(lines, delimiter)
    except (OSError, UnicodeError, csv.Error):
        return None
    return _Table(lines, rows) if rows else None


def _split(lines: Sequence[str], delimiter: str) -> list[list[str]]:
    return list(islice((row for row in csv.reader(lines, delimiter=delimiter) if row), _ROWS))


def _check_delimiter(path: Path, table: _Table, delimiter: str) -> None:
    if len(table.rows[0]) > 1 or len(table.rows) < 2:
        return
    for other in DELIMITERS:
        try:
            counts = [len(row) for row in _split(table.lines, other)]
        except csv.Error:
            continue
        if counts[0] > 1 and sum(count == counts[0] for count in counts) >= 0.9 * len(counts):
            raise InputError(
                f"{path} has one column if split by {_shown(delimiter)} and {counts[0]} if split by {_shown(other)}; "
                f"choose with --delimiter {_shown(other)} or {_shown(delimiter)}"
            )


def _shown(delimiter: str) -> str:
    return "tab" if delimiter == "\t" else repr(delimiter)


def _check_header(path: Path, table: _Table, config: DataConfig) -> None:
    header, body = table.rows[0], table.rows[1:]
    configured = {config.input_column, config.pair_column, config.label_column} - {None}
    columns = [[row[index].strip() for row in body if index < len(row)] for index in range(len(header))]
    names = [name.strip() for name in header]
    filled = [name for name in names if name]
    if any(name in configured and not _NUMBER.fullmatch(name) for name in names):
        return
    if any(_is_usual(name, column) for name, column in zip(names, columns, strict=True)):
        return
    if len(filled) > 1 and filled == [str(i) for i in range(len(filled))]:
        return  # tables without column names are often written with such a header
    for name, column in zip(names, columns, strict=True):
        reason = _like_data(name, column)
        if reason is not None:
            raise InputError(
                f"the first row of {path} seems to be data, not column names: {reason}; give --no-header if it is data "
                "(the columns are then called column1, column2 …), or --header if it is a header"
            )


def _is_usual(name: str, column: Sequence[str]) -> bool:
    """Return whether a name is common in headers; a letter that the column holds too (``y`` for yes) does not count."""
    return name.lower() in _USUAL_NAMES and (len(name) > 1 or name not in column)


def _like_data(name: str, column: Sequence[str]) -> str | None:
    values = [value for value in column if value]
    if not name or not values:
        return None
    if _NUMBER.fullmatch(name):
        return f"{name!r} heads a column of numbers" if all(map(_NUMBER.fullmatch, values)) else None
    if name in values:
        return f"{name!r} occurs again further down"
    if len(name.split()) >= _SENTENCE_WORDS or (name[-1] in ".!…" and " " in name):
        shown = name if len(name) <= 60 else name[:60] + "…"
        return f"{shown!r} reads like a sentence"
    return None
