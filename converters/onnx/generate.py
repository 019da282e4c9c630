"""Decode with an exported decoder and its cache, using only NumPy and ONNX Runtime."""

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from converters.errors import InputError
from converters.number_formats import ARRAY_FORMATS


def greedy_decode(
    session: onnxruntime.InferenceSession, input_ids: NDArray[np.int64], new_tokens: int
) -> NDArray[np.int64]:
    """Extend a prompt by the most likely token, ``new_tokens`` times. Decoding does not stop at an end token.

    Args:
        input_ids: the prompt, (batch, sequence), without padding.

    Returns:
        (batch, sequence + new_tokens), beginning with the prompt.

    Raises:
        InputError: the graph has no cache inputs, or the prompt is not a matrix with at least one token.
    """
    decoding = _Decoding(session, input_ids)
    tokens = step = input_ids.astype(np.int64)
    for _ in range(new_tokens):
        step = decoding.feed(step).argmax(axis=-1)[:, None]
        tokens = np.concatenate([tokens, step], axis=1)
    return tokens


def decode_along(
    session: onnxruntime.InferenceSession, input_ids: NDArray[np.int64], tokens: NDArray[np.int64]
) -> NDArray[np.floating]:
    """Return the logits (batch, K, vocabulary) before each of ``tokens`` (batch, K), given the prompt ``input_ids`` and
    the tokens before it.

    Raises:
        InputError: as `greedy_decode`.
    """
    decoding = _Decoding(session, input_ids)
    steps = [input_ids.astype(np.int64), *(tokens[:, i : i + 1] for i in range(tokens.shape[1] - 1))]
    return np.stack([decoding.feed(step) for step in steps], axis=1)


class _Decoding:
    """A session with the cache of all tokens that it has read."""

    def __init__(self, session: onnxruntime.InferenceSession, prompt: NDArray[np.int64]) -> None:
        if prompt.ndim != 2 or prompt.shape[1] == 0:
            raise InputError(f"input_ids must be (batch, sequence) with at least one token, got shape {prompt.shape}")
        self._session, self._cache, self._length = session, empty_cache(session, prompt.shape[0]), 0

    def feed(self, step: NDArray[np.int64]) -> NDArray[np.floating]:
        """Return the logits (batch, vocabulary) after the tokens ``step`` (batch, sequence)."""
        self._length += step.shape[1]
        present = [name.replace("past_key_values", "present", 1) for name in self._cache]
        inputs = step_inputs(self._session, step, self._length)
        logits, *updated = self._session.run(["logits", *present], inputs | self._cache)
        self._cache = dict(zip(self._cache, updated, strict=True))
        return logits[:, -1]


def empty_cache(session: onnxruntime.InferenceSession, batch: int) -> dict[str, NDArray[np.floating]]:
    """Return a past of length 0, (batch, heads, 0, width), for every cache input of the graph.

    Raises:
        InputError: the graph has none.
    """
    inputs = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    if not inputs:
        raise InputError("the graph has no past_key_values inputs; export it with the task text-generation")
    return {i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.dtype(ARRAY_FORMATS[i.type])) for i in inputs}


def step_inputs(
    session: onnxruntime.InferenceSession, step: NDArray[np.int64], total: int
) -> dict[str, NDArray[np.int64]]:
    """Return all inputs except the cache for the tokens ``step`` (batch, sequence), the last of ``total`` tokens,
    without padding."""
    batch, length = step.shape
    values = {
        "input_ids": step,
        "attention_mask": np.ones((batch, total), np.int64),
        "position_ids": np.tile(np.arange(total - length, total, dtype=np.int64), (batch, 1)),
    }
    return {i.name: values[i.name] for i in session.get_inputs() if i.name in values}
