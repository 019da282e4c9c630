"""Text for language models: one stream of tokens, cut into windows.

The rows of a split are one text: rows that end with a line break are joined as they are, others get one between
them; conversations, which have their own marks, get none. The stream gets no special tokens of its own. Each window
starts with the tokens that the tokenizer puts before a text (``<bos>``, where it puts one): a model that was trained
with them does not work without. They are context, never a target, and what a tokenizer puts after a text is left out,
since a window does not end one.

A long text is tokenised in chunks of about a million characters, in parallel. Chunks end after a letter or digit
that white space follows: byte-level BPE and WordPiece split there anyway, so the tokens are those of the whole text;
a tokenizer that sets a mark before every text (older SentencePiece models) may add one token a chunk.
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
    """The ids that the tokenizer puts before every text; none for many.

    Told from what it does, not from its settings: GPT-2's kin name a ``bos_token`` and do not use it.
    """
    special = set(tokenizer.all_special_tokens)
    words = (word for word in tokenizer.get_vocab() if word not in special)
    for text in ("a", *words):  # not every vocabulary knows an "a"
        bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if not bare:
            continue
        whole = list(tokenizer(text)["input_ids"])
        for at in range(len(whole) - len(bare) + 1):
            if whole[at : at + len(bare)] == bare:
                return tuple(whole[:at])
    return ()


def token_windows(
    texts: Iterable[str],
    tokenizer: Any,
    length: int,
    most: int | None = None,
    start: Sequence[int] = (),
    separator: str = "\n",
) -> np.ndarray:
    """Windows of ``length`` tokens (N×length, int32) that do not overlap; the rest at the end is dropped.

    Args:
        most: stop reading once there are this many windows.
        start: ids that every window starts with, counted in ``length``. Text that has them by itself just there does
            not get them twice.
        separator: what stands between rows that do not end with it.
    """
    parts: list[np.ndarray] = []
    wanted, count = None if most is None else most * length, 0
    chunks = chunked(texts, separator=separator)
    while batch := list(islice(chunks, CHUNKS_AT_ONCE)):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        parts += [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]
        count = sum(len(part) for part in parts)
        if wanted is not None and count >= wanted:
            break
    stream = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return _cut(stream, length, np.asarray(start, np.int32), most)


def _cut(stream: np.ndarray, length: int, start: np.ndarray, most: int | None) -> np.ndarray:
    windows: list[np.ndarray] = []
    at = 0
    while most is None or len(windows) < most:
        has_start = np.array_equal(stream[at : at + len(start)], start)
        end = at + length - (0 if has_start else len(start))
        if end > len(stream):
            break
        windows.append(stream[at:end] if has_start else np.concatenate([start, stream[at:end]]))
        at = end
    return np.stack(windows) if windows else np.empty((0, length), np.int32)


def chunked(texts: Iterable[str], size: int = CHUNK_CHARACTERS, separator: str = "\n") -> Iterator[str]:
    """The joined text in pieces of at least ``size`` characters, cut where a word ends.

    >>> list(chunked(["one two", "three\\n", "four"], size=6))
    ['one', ' two\\nthree', '\\nfour']
    """
    pieces: list[str] = []
    waiting, enough = 0, size
    for piece in _joined(texts, separator):
        pieces.append(piece)
        waiting += len(piece)
        if waiting < enough:
            continue
        text = "".join(pieces)
        cut = _last_word_end(text)
        if cut is not None:
            yield text[:cut]
            text = text[cut:]
        pieces, waiting = [text], len(text)
        enough = max(size, waiting + size // 2)  # where no cut was found, not again at every row
    if waiting:
        yield "".join(pieces)


def _joined(texts: Iterable[str], separator: str) -> Iterator[str]:
    ended = True
    for text in texts:
        yield text if ended else separator + text
        ended = text.endswith(separator)


def _last_word_end(text: str) -> int | None:
    start = max(0, len(text) - _CUT_REACH)
    return max((match.end() for match in _WORD_END.finditer(text, start)), default=None)
