"""Reads the index and the headers of a model's safetensors files, and checks that they agree. No weights are read."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open

from converters.errors import InputError

_LFS_POINTER = b"version https://git-lfs"
_AGAIN = "copy or download it again"
_SAVE = "save the model again with save_pretrained"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it.

    format: its number format in the notation of safetensors, such as ``BF16``.
    """

    file: Path
    format: str
    shape: tuple[int, ...]


def read_index(path: Path) -> dict[str, str]:
    """Return tensor name → file name from the index of a model in several files.

    Raises:
        InputError: the file is no such index, places a tensor twice, or names a file outside the model's folder.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); {_AGAIN}") from error
    except _RepeatedNameError as error:
        raise InputError(f"{path} names {error} twice, and it is unclear which one is meant; {_SAVE}") from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise InputError(f"{path} has no weight_map that gives the file of every tensor; {_AGAIN}")
    for name in files.values():
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise InputError(f"{path} names {name}, a file outside the model's folder; {_SAVE}")
    return files


class _RepeatedNameError(Exception):
    """A JSON object has a name twice. Parsers keep one of the two values without a word."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise _RepeatedNameError(name)
        entries[name] = value
    return entries


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return tensor name → its description, for all tensors in these files.

    Raises:
        InputError: a file is damaged or cut short, or a tensor is in two files.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in _read_header(path).items():
            if name in tensors:
                raise InputError(
                    f"{name} is in both {tensors[name].file.name} and {path}, so it is unclear which one is meant; "
                    "save the model again with save_pretrained"
                )
            tensors[name] = tensor
    return tensors


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        # Opening a file checks its header, and its size against the header.
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(path, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
            }
    except SafetensorError as error:
        with path.open("rb") as content:
            if content.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise InputError(
                    f"{path} is a pointer of Git LFS instead of weights; fetch them with git lfs pull"
                ) from error
        raise InputError(f"{path} is damaged or cut short ({error}); {_AGAIN}") from error


def check_placed(index: Path, files: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """Check that every tensor is in the file where an index places it.

    Args:
        index: the index, for the message.
        files: what `read_index` returned.
        tensors: what `read_headers` returned.

    Raises:
        InputError: a tensor is elsewhere or nowhere; the message names the first one.
    """
    for name, file in files.items():
        if name not in tensors:
            raise InputError(f"{file} of {index.parent} lacks {name}, which {index.name} places there; {_AGAIN}")
        found = tensors[name].file
        if found.name != PurePath(file).name:
            raise InputError(
                f"{name} is in {found}, but {index.name} places it in {file}; save the model again with save_pretrained"
            )
