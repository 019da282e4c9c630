"""Finds the safetensors files of a model, and reads their size and the dtype of the stored weights.

The dtype comes from the headers of the files: the ``dtype`` field of a config may be wrong.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn

from converters.dtypes import DTYPES, check_range
from converters.errors import InputError
from converters.number_formats import NUMBER_FORMATS, SOURCE_FORMATS
from prehab_export.inputs.model_source import readable
from prehab_export.inputs.shards import StoredTensor, check_placed, read_headers, read_index

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Name of the dtype in a file's header → our name. Tensors of other dtypes are not weights, or cannot be read here.
_FORMATS = {NUMBER_FORMATS[name].header: name for name in SOURCE_FORMATS}
# How names of number formats that are narrower than 16 bits begin.
_QUANTISED = ("F8_", "F6_", "F4")


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a model.

    files: the files that are loaded; other files in the same folder are not listed.
    bytes: total size of the files.
    dtypes: dtypes of the weights (``float64``, ``float32``, ``bfloat16``, ``float16``), the one with most bytes first.
    tensors: all tensors in the files, by name.
    """

    files: tuple[Path, ...]
    bytes: int
    dtypes: tuple[str, ...]
    tensors: Mapping[str, StoredTensor] = field(repr=False)

    @property
    def dtype(self) -> str:
        """The dtype that takes the most bytes."""
        return self.dtypes[0]

    @property
    def main_half(self) -> torch.dtype | None:
        """The half precision that most weights have; None if they have another, or the rest is not float32."""
        others = set(self.dtypes) - {self.dtype}
        return DTYPES[self.dtype] if self.dtype in ("bfloat16", "float16") and others <= {"float32"} else None

    @property
    def kept_dtype(self) -> str:
        """The dtype of an exported model that keeps the source's dtype; float64 cannot be kept and becomes float32."""
        return self.dtype if self.dtype in DTYPES else "float32"


def weight_files(model: str, *, revision: str | None = None, named: str | None = None) -> WeightFiles:
    """Return the weight files of a local folder or a hub id; files from the hub are downloaded into its cache.

    Args:
        named: the file or index that the model's config names (``transformers_weights``), if any.

    Raises:
        InputError: there are no weight files, a file that the index names is missing, a file is damaged or cut short,
            or the index and the files disagree.
    """
    check_has_weights(model)
    with readable(model, "weights"):
        entry = _entry(model, revision, named)
        if entry.suffix == ".json":
            index = read_index(entry)
            files = _shards(model, revision, entry, index)
            tensors = read_headers(files)
            check_placed(entry, index, tensors)
        else:
            files = (entry,)
            tensors = read_headers(files)
        sizes: Counter[str] = Counter()
        for tensor in tensors.values():
            if (dtype := _FORMATS.get(tensor.format)) is not None:
                sizes[dtype] += NUMBER_FORMATS[dtype].bytes * prod(tensor.shape)
        dtypes = tuple(dtype for dtype, _ in sizes.most_common()) or ("float32",)
        return WeightFiles(files, sum(path.stat().st_size for path in files), dtypes, tensors)


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


def load_exceptions(weights: WeightFiles, model: nn.Module) -> bool:
    """Give the weights that are stored in float32 back to a model that was loaded in half precision.

    Returns:
        Whether all of them were found in the model; if not, it has to be loaded in float32.
    """
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, stored in weights.tensors.items():
        if stored.format != NUMBER_FORMATS["float32"].header:
            continue
        with safe_open(stored.file, framework="pt") as file:
            value = file.get_tensor(name)
        # A tensor that was renamed or converted in loading is not recognised by its rounded values.
        if name not in tensors or not torch.equal(value.to(tensors[name].dtype), tensors[name]):
            return False
        tensors[name].data = value
    return True


def check_fit_model(weights: WeightFiles, model: nn.Module) -> None:
    """Check from the headers of the files that the weights are floating-point numbers of the model's shapes.

    Tensors that transformers renames, and shapes that differ in the order of dimensions only, are left to loading:
    transformers converts the weights of some architectures.

    Args:
        model: the model, which may be without weights.

    Raises:
        InputError: a tensor does not fit; the message names the first one.
    """
    expected: dict[str, Tensor] = model.state_dict()
    for name, tensor in weights.tensors.items():
        place = f"{name} in {tensor.file}"
        is_weight = name in expected and expected[name].is_floating_point()
        if tensor.format.startswith(_QUANTISED) or (is_weight and tensor.format not in _FORMATS):
            raise InputError(
                f"{place} is stored as {tensor.format}, a quantised format; give the original model with weights in "
                f"{', '.join(SOURCE_FORMATS)}"
            )
        if name in expected and sorted(tensor.shape) != sorted(expected[name].shape):
            raise InputError(
                f"{place} has shape {tensor.shape} instead of {tuple(expected[name].shape)}: the weights do not fit "
                "config.json; put the model's own config.json beside them"
            )


def _entry(model: str, revision: str | None, named: str | None) -> Path:
    """Find the weight file or the index of several, in the order in which transformers looks for them."""
    for name in [named] if named else [SINGLE, INDEX]:
        if (path := _path(model, name, revision)) is not None:
            return path
    if not Path(model).is_dir():
        hf_hub_download(model, SINGLE, revision=revision)  # raises an error with the hub's own reason
    raise InputError(f"{model} has neither {named or SINGLE} nor {INDEX}; save it with save_pretrained")


def _shards(model: str, revision: str | None, entry: Path, index: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the files that an index names."""
    paths = {name: _path(model, name, revision) for name in sorted(set(index.values()))}
    for name, path in paths.items():
        if path is None:
            raise InputError(
                f"{model} lacks {name}, which {entry.name} names; the copy is incomplete, so copy it again"
            )
    return tuple(path for path in paths.values() if path is not None)


def _path(model: str, name: str, revision: str | None) -> Path | None:
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except EntryNotFoundError:
        return None
