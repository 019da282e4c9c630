"""Cuts text for language models into windows of tokens.

All rows of a split form one text. A line break is inserted between rows unless a row ends with one; conversations have
their own marks and get none. No special tokens are added to the stream. Each window starts with the tokens that the
tokenizer puts before a text (``<bos>`` if it has one), because a model trained with them does not work without. They
are context, never a target. Tokens that the tokenizer puts after a text are left out, because a window does not end a
text.

A long text is tokenised in chunks of about a million characters, in parallel. A chunk ends after a letter or digit that
is followed by white space. Byte-level BPE and WordPiece split there anyway, so the tokens are the same as for the whole
text; a tokenizer that puts a mark before every text (older SentencePiece models) may add one token per chunk.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

CHUNK_CHARACTERS = 1_000_000
CHUNKS_AT_ONCE = 4
_CUT_REACH = 2000
_WORD_END = re.compile(r"[^\W_](?=\s)")


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before every text; many tokenizers put none.

    They are found by tokenising a word, not from the settings: GPT-2 and similar tokenizers name a ``bos_token`` but do
    not use it.
    """
    special = set(tokenizer.all_special_tokens)
    words = (word for word in tokenizer.get_vocab() if word not in special)
    for text in ("a", *words):  # not every vocabulary contains "a"
        plain_ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not plain_ids:
            continue
        all_ids = list(tokenizer(text)["input_ids"])
        for position in range(len(all_ids) - len(plain_ids) + 1):
            if all_ids[position : position + len(plain_ids)] == plain_ids:
                return tuple(all_ids[:position])
    return ()


def token_windows(
    texts: Iterable[str],
    tokenizer: Any,
    length: int,
    max_windows: int | None = None,
    start_ids: Sequence[int] = (),
    separator: str = "\n",
) -> np.ndarray:
    """Return non-overlapping windows of ``length`` tokens (N×length, int32); an incomplete last window is dropped.

    Args:
        max_windows: stop reading after this many windows.
        start_ids: ids that every window starts with; they count towards ``length``. A window whose text already starts
            with them does not get them twice.
        separator: text inserted between rows that do not end with it.
    """
    parts: list[np.ndarray] = []
    max_tokens, count = None if max_windows is None else max_windows * length, 0
    chunks = chunked(texts, separator=separator)
    while batch := list(islice(chunks, CHUNKS_AT_ONCE)):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        parts += [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]
        count = sum(len(part) for part in parts)
        if max_tokens is not None and count >= max_tokens:
            break
    stream = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return _cut(stream, length, np.asarray(start_ids, np.int32), max_windows)


def _cut(stream: np.ndarray, length: int, start_ids: np.ndarray, max_windows: int | None) -> np.ndarray:
    windows: list[np.ndarray] = []
    position = 0
    while max_windows is None or len(windows) < max_windows:
        has_start = np.array_equal(stream[position : position + len(start_ids)], start_ids)
        end = position + length - (0 if has_start else len(start_ids))
        if end > len(stream):
            break
        windows.append(stream[position:end] if has_start else np.concatenate([start_ids, stream[position:end]]))
        position = end
    return np.stack(windows) if windows else np.empty((0, length), np.int32)


def chunked(texts: Iterable[str], size: int = CHUNK_CHARACTERS, separator: str = "\n") -> Iterator[str]:
    """Yield the joined text in chunks of at least ``size`` characters, each cut at the end of a word.

    >>> list(chunked(["one two", "three\\n", "four"], size=6))
    ['one', ' two\\nthree', '\\nfour']
    """
    pieces: list[str] = []
    buffered, threshold = 0, size
    for piece in _joined(texts, separator):
        pieces.append(piece)
        buffered += len(piece)
        if buffered < threshold:
            continue
        text = "".join(pieces)
        cut = _last_word_end(text)
        if cut is not None:
            yield text[:cut]
            text = text[cut:]
        pieces, buffered = [text], len(text)
        threshold = max(size, buffered + size // 2)  # if no cut was found, do not search again at every row
    if buffered:
        yield "".join(pieces)


def _joined(texts: Iterable[str], separator: str) -> Iterator[str]:
    ended = True
    for text in texts:
        yield text if ended else separator + text
        ended = text.endswith(separator)


def _last_word_end(text: str) -> int | None:
    start = max(0, len(text) - _CUT_REACH)
    return max((match.end() for match in _WORD_END.finditer(text, start)), default=None)
