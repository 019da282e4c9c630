"""What a session is fed in a case of the bench: inputs made up from the graph's own description of them."""

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
    """Threads; sizes of a request: items in the batch, tokens in the prompt, tokens to generate, ids to draw from; ids
    that a text ends with."""

    threads: int
    batch: int
    sequence: int | None
    new_tokens: int
    vocab_size: int | None
    end_tokens: Sequence[int] = ()


@dataclass(frozen=True)
class PreparedRequest:
    """A session and everything that it is fed in one request, made before the clock starts."""

    session: ort.InferenceSession
    outputs: list[str]
    prefill: Feeds
    steps: list[Feeds]
    cache: dict[str, int]  # past input → index of the output that replaces it


def prepare_request(session: ort.InferenceSession, case: Case) -> PreparedRequest:
    """Inputs from the graph's own metadata.

    Raises:
        ValueError: the graph fixes a size otherwise, or takes an input that nothing is known about.
    """
    rng = np.random.default_rng(SEED)
    outputs = [output.name for output in session.get_outputs()]
    past = [node for node in session.get_inputs() if node.name.startswith("past_key_values.")]
    plain = [node for node in session.get_inputs() if not node.name.startswith("past_key_values.")]
    sequence = case.sequence or 0
    prefill = {node.name: _values(node, case, 0, sequence, rng) for node in plain}
    prefill |= {node.name: _empty_cache(node, case.batch) for node in past}
    steps = range(sequence, sequence + case.new_tokens - 1) if past else ()
    return PreparedRequest(
        session=session,
        outputs=outputs,
        prefill=_ort_values(prefill),
        steps=[_ort_values({n.name: _values(n, case, length, 1, rng) for n in plain}) for length in steps],
        cache={node.name: _present(node.name, outputs) for node in past},
    )


def _values(node: Any, case: Case, past: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """One input (not the cache) for ``length`` new tokens after ``past`` old ones."""
    dtype = _numpy_type(node)
    if node.name == "input_ids":
        if case.vocab_size is None:
            raise ValueError("no size of the vocabulary was given for input_ids")
        ids = rng.integers(0, case.vocab_size, _shape(node, (case.batch, length)), dtype=dtype)
        return _ended(ids, case.vocab_size, case.end_tokens)
    if node.name in ("position_ids", "cache_position"):
        wanted = (case.batch, length) if len(node.shape) == 2 else (length,)
        return np.broadcast_to(np.arange(past, past + length, dtype=dtype), _shape(node, wanted)).copy()
    if node.name == "token_type_ids":
        return np.zeros(_shape(node, (case.batch, length)), dtype)
    if node.name == "attention_mask":
        return np.ones(_shape(node, (case.batch, past + length)), dtype)
    if np.issubdtype(dtype, np.floating):  # pixel_values and the like: only the batch may be free
        return rng.standard_normal(_shape(node, (case.batch, *node.shape[1:]))).astype(dtype)
    raise ValueError(f"the graph takes an input {node.name} ({node.type}) that the bench cannot make up")


def _ended(ids: np.ndarray, vocab_size: int, ends: Sequence[int]) -> np.ndarray:
    """The ids with these at the end of each row and nowhere else, where they have the room."""
    others = np.setdiff1d(np.arange(vocab_size, dtype=ids.dtype), ends)
    if not ends or len(ends) >= ids.shape[1] or not len(others):
        return ids
    ids = np.where(np.isin(ids, ends), others[ids % len(others)], ids)
    ids[:, -len(ends) :] = ends
    return ids


def _empty_cache(node: Any, batch: int) -> np.ndarray:
    """(batch, …) with length 0 at the one free dimension."""
    free = [i for i, size in enumerate(node.shape) if i > 0 and not isinstance(size, int)]
    if len(free) != 1:
        raise ValueError(f"the cache input {node.name} {node.shape} needs exactly one free length")
    return np.zeros(
        _shape(node, (batch, *(0 if i in free else size for i, size in enumerate(node.shape) if i))),
        _numpy_type(node),
    )


def _shape(node: Any, wanted: tuple[Any, ...]) -> tuple[int, ...]:
    """``wanted``, once it is seen to fit the shape that the graph declares."""
    if not all(isinstance(size, int) for size in wanted):
        raise ValueError(f"the graph leaves sizes of {node.name} {node.shape} free; export it with fixed sizes")
    fits = len(wanted) == len(node.shape) and all(
        not isinstance(declared, int) or declared == size for size, declared in zip(wanted, node.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"the graph declares {node.name} as {node.shape}, but {list(wanted)} was asked for")
    return wanted


def _numpy_type(node: Any) -> np.dtype[Any]:
    if node.type not in ARRAY_FORMATS:
        raise ValueError(f"the graph's input {node.name} is a {node.type}, which the bench cannot make up")
    return np.dtype(ARRAY_FORMATS[node.type])


def _present(past: str, outputs: list[str]) -> int:
    name = past.replace("past_key_values.", "present.", 1)
    if name not in outputs:
        raise ValueError(f"the graph takes {past} but has no output {name} to feed it from")
    return outputs.index(name)


def _ort_values(arrays: dict[str, np.ndarray]) -> Feeds:
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
