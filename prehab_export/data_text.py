"""Text for language models: one stream of tokens, cut into windows.

The rows of a split are one text: rows that end with a line break are joined as they are, others get one between
them. The stream has no special tokens of its own (no BOS at the head of a window): perplexity is over plain text.

A long text is tokenised in chunks of about a million characters, in parallel. Chunks end after a letter or digit
that white space follows: byte-level BPE and WordPiece split there anyway, so the tokens are those of the whole text;
a tokenizer that sets a mark before every text (older SentencePiece models) may add one token a chunk.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

CHUNK_CHARACTERS = 1_000_000
CHUNKS_AT_ONCE = 4
_CUT_REACH = 2000
_WORD_END = re.compile(r"[^\W_](?=\s)")


def token_windows(texts: Iterable[str], tokenizer: Any, length: int, most: int | None = None) -> np.ndarray:
    """Non-overlapping windows of ``length`` tokens (N×length, int32); the rest at the end is dropped.

    most: stop reading once there are this many windows.
    """
    parts: list[np.ndarray] = []
    wanted, count = None if most is None else most * length, 0
    chunks = chunked(texts)
    while batch := list(islice(chunks, CHUNKS_AT_ONCE)):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        parts += [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]
        count = sum(len(part) for part in parts)
        if wanted is not None and count >= wanted:
            break
    whole = count // length if most is None else min(count // length, most)
    stream = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return stream[: whole * length].reshape(whole, length)


def chunked(texts: Iterable[str], size: int = CHUNK_CHARACTERS) -> Iterator[str]:
    """The joined text in pieces of at least ``size`` characters, cut where a word ends.

    >>> list(chunked(["one two", "three\\n", "four"], size=6))
    ['one', ' two\\nthree', '\\nfour']
    """
    pieces: list[str] = []
    waiting, enough = 0, size
    for piece in _joined(texts):
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


def _joined(texts: Iterable[str]) -> Iterator[str]:
    ended = True
    for text in texts:
        yield text if ended else "\n" + text
        ended = text.endswith("\n")


def _last_word_end(text: str) -> int | None:
    start = max(0, len(text) - _CUT_REACH)
    return max((match.end() for match in _WORD_END.finditer(text, start)), default=None)
