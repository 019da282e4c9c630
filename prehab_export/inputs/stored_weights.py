"""Finds the safetensors files of a model, and reads their size and the dtype of the stored weights.

The dtype comes from the headers of the files: the ``dtype`` field of a config may be wrong.
"""

import json
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open

from converters.dtypes import DTYPES, check_range
from converters.errors import InputError
from converters.number_formats import NUMBER_FORMATS, SOURCE_FORMATS
from prehab_export.inputs.model_source import readable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Name of the dtype in a file's header → our name. Tensors of other dtypes are not weights, or cannot be read here.
_FORMATS = {NUMBER_FORMATS[name].header: name for name in SOURCE_FORMATS}


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a model.

    files: the files that are loaded; other files in the same folder are not listed.
    bytes: total size of the files.
    dtypes: dtypes of the weights (``float64``, ``float32``, ``bfloat16``, ``float16``), the one with most bytes first.
    """

    files: tuple[Path, ...]
    bytes: int
    dtypes: tuple[str, ...]

    @property
    def dtype(self) -> str:
        """The dtype that takes the most bytes."""
        return self.dtypes[0]

    @property
    def single_half(self) -> torch.dtype | None:
        """The dtype of all weights if that is half precision; None if it is not, or if they have several."""
        return DTYPES[self.dtype] if self.dtypes in (("bfloat16",), ("float16",)) else None

    @property
    def kept_dtype(self) -> str:
        """The dtype of an exported model that keeps the source's dtype; float64 cannot be kept and becomes float32."""
        return self.dtype if self.dtype in DTYPES else "float32"


def weight_files(model: str, *, revision: str | None = None, named: str | None = None) -> WeightFiles:
    """Return the weight files of a local folder or a hub id; files from the hub are downloaded into its cache.

    Args:
        named: the file or index that the model's config names (``transformers_weights``), if any.

    Raises:
        InputError: there are no weight files, the index names a missing file, or a file is damaged.
    """
    check_has_weights(model)
    with readable(model, "weights"):
        files = _files(model, revision, named)
        sizes: Counter[str] = Counter()
        for path in files:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(name)
                    if (dtype := _FORMATS.get(part.get_dtype())) is not None:
                        sizes[dtype] += NUMBER_FORMATS[dtype].bytes * prod(part.get_shape())
        dtypes = tuple(dtype for dtype, _ in sizes.most_common()) or ("float32",)
        return WeightFiles(files, sum(path.stat().st_size for path in files), dtypes)


def check_has_weights(model: str) -> None:
    """Check that a local folder holds safetensors; a hub id always passes.

    Raises:
        InputError: there are none; the message names what the folder holds instead.
    """
    path = Path(model)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        pickled = sorted(file.name for file in (*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")))
        contents = f"only {pickled[0]}, a pickle, which can run code when read" if pickled else "no weights"
        raise InputError(f"{model} has {contents}; save it with save_pretrained, which writes safetensors")


def check_fit_in(weights: WeightFiles, dtype: str) -> None:
    """Check, tensor by tensor and without a model, that the dtype can hold all weights.

    Raises:
        InputError: a weight is too large; the message names the first such tensor.
    """
    target = DTYPES[dtype]
    if target != torch.float16:  # the other dtypes have the range of float32
        return
    for path in weights.files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if _FORMATS.get(tensors.get_slice(name).get_dtype(), "float16") != "float16":
                    check_range(name, tensors.get_tensor(name), target)


def _files(model: str, revision: str | None, named: str | None) -> tuple[Path, ...]:
    """Find the weight files, in the order in which transformers looks for them."""
    entry = next(
        (path for name in ([named] if named else [SINGLE, INDEX]) if (path := _path(model, name, revision))), None
    )
    if entry is None:
        if not Path(model).is_dir():
            hf_hub_download(model, SINGLE, revision=revision)  # raises an error with the hub's own reason
        raise InputError(f"{model} has neither {named or SINGLE} nor {INDEX}; save it with save_pretrained")
    if entry.suffix != ".json":
        return (entry,)
    index = json.loads(entry.read_text(encoding="utf-8"))
    names = sorted(set(index["weight_map"].values()))
    paths = {name: _path(model, name, revision) for name in names}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise InputError(f"{model} lacks {missing[0]}, which {entry.name} names; the copy is incomplete")
    return tuple(path for path in paths.values() if path is not None)


def _path(model: str, name: str, revision: str | None) -> Path | None:
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except EntryNotFoundError:
        return None
