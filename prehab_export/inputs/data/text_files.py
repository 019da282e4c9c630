"""Files of text, looked at before they are read: what separates columns, and whether the first row names them."""

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

# Readers of `datasets` that decode text. A byte order mark is not part of it.
TEXT_READERS = ("csv", "json", "text")
UTF_8 = "utf-8-sig"
DELIMITERS = (",", ";", "\t", "|")
_ROWS = 1000
_HEAD = 1 << 16
_ZEROS = 0.5  # of the upper bytes, in text that is mostly Latin
_PACKED = (b"\x1f\x8b", b"PK", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # what `datasets` unpacks by itself
_CHARACTERS = 1 << 20
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# Names that tables have at their head, and hardly any row has.
_USUAL_NAMES = frozenset((*TEXT_NAMES, *LABEL_NAMES, *INDEX_NAMES, *(name for pair in PAIR_NAMES for name in pair)))
_SENTENCE_WORDS = 5


def reader_options(reader: str, config: DataConfig) -> dict[str, Any]:
    """What one of `datasets`' readers has to be told.

    Raises:
        InputError: an option that such files have no use for.
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
        options["keep_linebreaks"] = True  # they belong to a text
    if reader == "csv":
        options["keep_default_na"] = False  # the word "null" in a cell is a word
        if config.delimiter is not None:
            options["sep"] = config.separator
    return options


def encoding_of(config: DataConfig) -> str:
    given = config.encoding
    return UTF_8 if given is None or codecs.lookup(given).name == "utf-8" else given


def check_text(files: Iterable[Path], reader: str, config: DataConfig) -> None:
    """Refuse what decodes without an error and is no text: two bytes a letter are taken for letters and zeros.

    Raises:
        InputError: a file with zeros in it.
    """
    if reader not in TEXT_READERS or config.encoding is not None:
        return
    for path in files:
        try:
            with path.open("rb") as file:
                head = file.read(_HEAD)
        except OSError:  # the reader will say
            continue
        likely = guess_encoding(head)
        if likely is not None:
            raise InputError(f"{path} is not UTF-8 text; say what it is, as in --encoding {likely}")
        if b"\0" in head and not head.startswith(_PACKED):
            raise InputError(f"{path} holds zero bytes, which text does not; take them out, or give its --encoding")


def guess_encoding(head: bytes) -> str | None:
    """Of text in two or four bytes a letter, by its mark or by where its zeros stand."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) < _ZEROS * (len(head) // 2) or min(even, odd) > 0:
        return None
    return ("utf-16-le" if odd else "utf-16-be") if len(head) > 1 else None


def table_options(files: Iterable[Path], delimiter: str, config: DataConfig) -> dict[str, Any]:
    """What the reader of csv files has to be told of these files, by a look at the head of each.

    Raises:
        InputError: another delimiter than this one separates it, or its first row is not a header.
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
    return {"names": [f"column{at + 1}" for at in range(width)]} if config.header is False else {}


@dataclass(frozen=True)
class _Table:
    """lines: as they stand in the file; rows: the same, split."""

    lines: list[str]
    rows: list[list[str]]


def _head(path: Path, delimiter: str, encoding: str) -> _Table | None:
    """The first rows; None where they cannot be told, which the reader itself will say better."""
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
                f"{path} has one column by {_shown(delimiter)} and {counts[0]} by {_shown(other)}; say which is right "
                f"with --delimiter {_shown(other)} or {_shown(delimiter)}"
            )


def _shown(delimiter: str) -> str:
    return "tab" if delimiter == "\t" else repr(delimiter)


def _check_header(path: Path, table: _Table, config: DataConfig) -> None:
    names, body = table.rows[0], table.rows[1:]
    named = {config.input_column, config.pair_column, config.label_column} - {None}
    columns = [[row[at].strip() for row in body if at < len(row)] for at in range(len(names))]
    heads = [name.strip() for name in names]
    given = [name for name in heads if name]
    if any(name in named and not _NUMBER.fullmatch(name) for name in heads):
        return
    if any(_is_usual(name, column) for name, column in zip(heads, columns, strict=True)):
        return
    if len(given) > 1 and given == [str(i) for i in range(len(given))]:
        return  # as tables without names are written
    for name, column in zip(heads, columns, strict=True):
        reason = _like_data(name, column)
        if reason is not None:
            raise InputError(
                f"the first row of {path} seems to be data, not names of columns: {reason}; give --no-header if it is "
                "data (columns are then column1, column2 …), or --header if these are names"
            )


def _is_usual(name: str, column: Sequence[str]) -> bool:
    """``y`` may be a yes."""
    return name.lower() in _USUAL_NAMES and (len(name) > 1 or name not in column)


def _like_data(name: str, column: Sequence[str]) -> str | None:
    values = [value for value in column if value]
    if not name or not values:
        return None
    if _NUMBER.fullmatch(name):
        return f"{name!r} heads a column of numbers" if all(map(_NUMBER.fullmatch, values)) else None
    if name in values:
        return f"{name!r} is there again further down"
    if len(name.split()) >= _SENTENCE_WORDS or (name[-1] in ".!…" and " " in name):
        shown = name if len(name) <= 60 else name[:60] + "…"
        return f"{shown!r} reads like a sentence"
    return None
