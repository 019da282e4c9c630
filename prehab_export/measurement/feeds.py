"""Synthetic inputs for a session, generated from the input descriptions of its graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from converters.number_formats import ARRAY_FORMATS

SEED = 0

Feeds = dict[str, ort.OrtValue]


@dataclass(frozen=True)
class Case:
    """The sizes of a request, and the threads that serve it.

    threads: intra-op threads of ONNX Runtime.
    batch: items in the batch.
    sequence: tokens in the prompt; None for models that take no tokens.
    new_tokens: tokens that a decoder generates, the first one included.
    vocab_size: upper bound of the random token ids; None for models that take no tokens.
    end_tokens: ids that end every text and occur nowhere else.
    """

    threads: int
    batch: int
    sequence: int | None
    new_tokens: int
    vocab_size: int | None
    end_tokens: Sequence[int] = ()


@dataclass(frozen=True)
class PreparedRequest:
    """A session and all inputs of one request, prepared so that only the runs are timed.

    outputs: names of the outputs.
    prefill: inputs of the first run.
    steps: inputs of each decode step, without the cache.
    cache: cache input → index of the output that replaces it.
    """

    session: ort.InferenceSession
    outputs: list[str]
    prefill: Feeds
    steps: list[Feeds]
    cache: dict[str, int]


def prepare_request(session: ort.InferenceSession, case: Case) -> PreparedRequest:
    """Generate the inputs of a request from the graph's metadata.

    Raises:
        ValueError: the graph fixes a size to another value, or has an input of unknown meaning.
    """
    rng = np.random.default_rng(SEED)
    outputs = [output.name for output in session.get_outputs()]
    cache_inputs = [node for node in session.get_inputs() if node.name.startswith("past_key_values.")]
    other_inputs = [node for node in session.get_inputs() if not node.name.startswith("past_key_values.")]
    sequence = case.sequence or 0
    prefill = {node.name: _values(node, case, 0, sequence, rng) for node in other_inputs}
    prefill |= {node.name: _empty_cache(node, case.batch) for node in cache_inputs}
    past_lengths = range(sequence, sequence + case.new_tokens - 1) if cache_inputs else ()
    return PreparedRequest(
        session=session,
        outputs=outputs,
        prefill=_ort_values(prefill),
        steps=[
            _ort_values({node.name: _values(node, case, past, 1, rng) for node in other_inputs})
            for past in past_lengths
        ],
        cache={node.name: _present_index(node.name, outputs) for node in cache_inputs},
    )


def _values(node: Any, case: Case, past: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Generate one input that is not part of the cache, for ``length`` new tokens after ``past`` cached ones."""
    dtype = _numpy_type(node)
    if node.name == "input_ids":
        if case.vocab_size is None:
            raise ValueError("input_ids needs vocab_size, which was not given")
        ids = rng.integers(0, case.vocab_size, _check_shape(node, (case.batch, length)), dtype=dtype)
        return _append_end_tokens(ids, case.vocab_size, case.end_tokens)
    if node.name in ("position_ids", "cache_position"):
        shape = (case.batch, length) if len(node.shape) == 2 else (length,)
        return np.broadcast_to(np.arange(past, past + length, dtype=dtype), _check_shape(node, shape)).copy()
    if node.name == "token_type_ids":
        return np.zeros(_check_shape(node, (case.batch, length)), dtype)
    if node.name == "attention_mask":
        return np.ones(_check_shape(node, (case.batch, past + length)), dtype)
    if np.issubdtype(dtype, np.floating):  # such as pixel_values, where only the batch size may be free
        return rng.standard_normal(_check_shape(node, (case.batch, *node.shape[1:]))).astype(dtype)
    raise ValueError(f"the graph takes an input {node.name} ({node.type}) that the bench cannot generate")


def _append_end_tokens(ids: np.ndarray, vocab_size: int, end_tokens: Sequence[int]) -> np.ndarray:
    """End each row of ids with the end tokens, and replace them elsewhere. Rows that are too short stay unchanged."""
    other_tokens = np.setdiff1d(np.arange(vocab_size, dtype=ids.dtype), end_tokens)
    if not end_tokens or len(end_tokens) >= ids.shape[1] or not len(other_tokens):
        return ids
    ids = np.where(np.isin(ids, end_tokens), other_tokens[ids % len(other_tokens)], ids)
    ids[:, -len(end_tokens) :] = end_tokens
    return ids


def _empty_cache(node: Any, batch: int) -> np.ndarray:
    """Return an empty cache input: its first axis is the batch, and its one free axis has length 0."""
    free_axes = [axis for axis, size in enumerate(node.shape) if axis > 0 and not isinstance(size, int)]
    if len(free_axes) != 1:
        raise ValueError(f"the cache input {node.name} {node.shape} needs exactly one free length")
    return np.zeros(
        _check_shape(
            node, (batch, *(0 if axis in free_axes else size for axis, size in enumerate(node.shape) if axis))
        ),
        _numpy_type(node),
    )


def _check_shape(node: Any, shape: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the shape if it matches the one that the graph declares for the input; otherwise raise a `ValueError`."""
    if not all(isinstance(size, int) for size in shape):
        raise ValueError(f"the graph leaves sizes of {node.name} {node.shape} free; export it with fixed sizes")
    matches = len(shape) == len(node.shape) and all(
        not isinstance(declared, int) or declared == size for size, declared in zip(shape, node.shape, strict=True)
    )
    if not matches:
        raise ValueError(f"the graph declares {node.name} as {node.shape}, but this case needs {list(shape)}")
    return shape


def _numpy_type(node: Any) -> np.dtype[Any]:
    if node.type not in ARRAY_FORMATS:
        raise ValueError(f"the graph's input {node.name} is a {node.type}, which the bench cannot generate")
    return np.dtype(ARRAY_FORMATS[node.type])


def _present_index(past: str, outputs: list[str]) -> int:
    """Return the index of the output that holds the next value of a cache input."""
    name = past.replace("past_key_values.", "present.", 1)
    if name not in outputs:
        raise ValueError(f"the graph takes {past} but has no output {name} to feed it from")
    return outputs.index(name)


def _ort_values(arrays: dict[str, np.ndarray]) -> Feeds:
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
