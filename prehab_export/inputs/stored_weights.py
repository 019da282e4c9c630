"""The safetensors files that a model is loaded from: their size, and the dtype that the weights have in them.

A config's own ``dtype`` is what someone once said; the headers of the files are what is there.
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
# What weights are, by what a header calls it; anything else in a file is none, or not to be read here.
_FORMATS = {NUMBER_FORMATS[name].header: name for name in SOURCE_FORMATS}


@dataclass(frozen=True)
class WeightFiles:
    """files: those that are loaded, and no others that lie beside them. bytes: of the files. dtypes: of their weights
    (``float64``, ``float32``, ``bfloat16``, ``float16``), the one with most bytes first."""

    files: tuple[Path, ...]
    bytes: int
    dtypes: tuple[str, ...]

    @property
    def dtype(self) -> str:
        """Of most of the weights, by bytes."""
        return self.dtypes[0]

    @property
    def kept_dtype(self) -> str:
        """The dtype of an artifact that keeps the source's: what cannot be kept (float64) becomes float32."""
        return self.dtype if self.dtype in DTYPES else "float32"


def weight_files(model: str, *, revision: str | None = None, named: str | None = None) -> WeightFiles:
    """The weight files of a local folder or a hub id; those of the hub are fetched into its cache.

    Args:
        named: the file or index that the model's config names (``transformers_weights``), if it does.

    Raises:
        InputError: there are none, an index names one that is not there, or a file is damaged.
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
    """Refuse a local folder without safetensors; a hub id passes.

    Raises:
        InputError: the message names what is there instead.
    """
    path = Path(model)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        pickled = sorted(file.name for file in (*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")))
        found = f"only {pickled[0]}, a pickle, which can run code when read" if pickled else "no weights"
        raise InputError(f"{model} has {found}; save it with save_pretrained, which writes safetensors")


def check_fit_in(weights: WeightFiles, dtype: str) -> None:
    """Refuse weights that are too large for the dtype, tensor by tensor, without a model.

    Raises:
        InputError: there are some; the first is named.
    """
    target = DTYPES[dtype]
    if target != torch.float16:  # the others reach as far as float32
        return
    for path in weights.files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if _FORMATS.get(tensors.get_slice(name).get_dtype(), "float16") != "float16":
                    check_range(name, tensors.get_tensor(name), target)


def _files(model: str, revision: str | None, named: str | None) -> tuple[Path, ...]:
    """In the order in which transformers looks for them."""
    entry = next(
        (path for name in ([named] if named else [SINGLE, INDEX]) if (path := _path(model, name, revision))), None
    )
    if entry is None:
        if not Path(model).is_dir():
            hf_hub_download(model, SINGLE, revision=revision)  # raises, with the hub's own reason
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
