"""Decodes images to 8 bits per channel, and checks that they are readable before anything slow starts.

Transparency is dropped, as in transformers' own loading: the colours beneath it show. Values with more than 8 bits are
scaled by the range of their type, not by the values of the image, so that a dark image stays dark.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as PilImage
from transformers import PreTrainedConfig

from converters.errors import InputError
from converters.model_config import USUAL_IMAGE_SIZE, image_channels, image_size
from prehab_export.inputs.model_source import first_line
from prehab_export.inputs.models import empty_model
from prehab_export.inputs.tasks import Task
from prehab_export.system import bar

# Images per split that are checked before work starts; damage in later rows is found when the row is used.
MAX_CHECKED = 20_000
_ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
# Modes that Pillow converts unambiguously and without loss of range.
_PLAIN_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})
_SIXTEEN_BITS = 65535
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange rows and columns
# Exceptions that Pillow raises for damaged files.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, PilImage.DecompressionBombError)


@dataclass(frozen=True)
class ImageSplit:
    """The images in the rows of a split.

    mode: Pillow mode of the decoded images, ``L`` for a model with one channel, else ``RGB``.
    declared: mode in which the dataset's features ask to read the images, if any.
    name: name of the split.
    """

    rows: Dataset
    column: str
    mode: str
    declared: str | None
    name: str

    @classmethod
    def of(cls, rows: Dataset, column: str, model_config: PreTrainedConfig, split: str) -> "ImageSplit":
        feature = rows.features[column]
        declared = feature.mode if isinstance(feature, Image) else None
        # mode=None keeps the values as stored: converting here would clip those with more than 8 bits.
        images = rows.select_columns([column]).cast_column(column, Image(mode=None))
        return cls(images, column, "L" if image_channels(model_config) == 1 else "RGB", declared, split)

    def decoded(self, row: int) -> PilImage.Image:
        """Decode the image of a row.

        Raises:
            InputError: there is no image, or it cannot be read; the message names the row, and the file if known.
        """
        try:
            image = self.rows[row][self.column]
            if image is None:
                raise OSError("there is none")
            return self._convert(image)
        except _DAMAGED as error:
            raise self._unreadable(row, error) from error

    def check(self) -> "ImageFacts":
        """Check the first `MAX_CHECKED` images without decoding more than needed.

        Raises:
            InputError: an image is missing or cannot be read, as in `decoded`.
        """
        files = self.rows.cast_column(self.column, Image(decode=False))
        count = min(MAX_CHECKED, len(files))
        shapes: dict[tuple[int, int], int] = {}
        transparent = row = 0
        with bar(f"check images of {self.name}", count) as advance:
            for batch in files.select(range(count)).iter(batch_size=100):
                for file in batch[self.column]:
                    try:
                        size, has_alpha = self._inspect(row, file)
                    except _DAMAGED as error:
                        raise self._unreadable(row, error) from error
                    shapes.setdefault(size, row)
                    transparent += has_alpha
                    row += 1
                advance(len(batch[self.column]))
        return ImageFacts(shapes, transparent, count)

    def _inspect(self, row: int, image_file: dict[str, Any] | None) -> tuple[tuple[int, int], bool]:
        """Check one image; return its size (width, height) and whether it has transparency."""
        if image_file is None:
            raise OSError("there is none")
        if image_file["bytes"] is None and "://" in image_file["path"]:  # inside an archive, or on the hub
            return self.decoded(row).size, False
        source = image_file["path"] if image_file["bytes"] is None else BytesIO(image_file["bytes"])
        with PilImage.open(source) as image:
            has_alpha = image.mode in _ALPHA_MODES or "transparency" in image.info
            sideways = _is_sideways(image)
            if image.mode not in _PLAIN_MODES:
                self._convert(image)
            elif image.format == "PNG":
                image.verify()  # checks the checksums of all chunks
            elif image.format != "JPEG" or not _ends_as_jpeg(source):
                image.load()
            size = image.size  # read after loading, which rotates TIFF files
        return size[::-1] if sideways else size, has_alpha

    def _convert(self, image: PilImage.Image) -> PilImage.Image:
        image = in_eight_bits(image)
        return (image if self.declared is None else image.convert(self.declared)).convert(self.mode)

    def _unreadable(self, row: int, error: Exception) -> InputError:
        file = self.rows.cast_column(self.column, Image(decode=False))[row][self.column]
        path = f", {file['path']}" if file and file.get("path") else ""
        reason = "it is not an image of a known kind" if isinstance(error, UnidentifiedImageError) else str(error)
        return InputError(
            f"row {row} of {self.name}{path}: cannot read the image in column {self.column!r}: {reason}; "
            "repair or remove it"
        )


@dataclass(frozen=True)
class ImageFacts:
    """The results of checking the images of a split.

    sizes: (width, height) → a row with an image of that size.
    transparent: how many of the ``checked`` images have transparency.
    """

    sizes: dict[tuple[int, int], int]
    transparent: int
    checked: int

    @property
    def warnings(self) -> tuple[str, ...]:
        if not self.transparent:
            return ()
        return ("images with transparency lose it: the colours beneath it show, as in transformers' own loading",)

    @property
    def extremes(self) -> list[int]:
        """Rows of the smallest, largest, widest and tallest image.

        A processor that brings these to the same shape does so for all images.
        """
        by_area = sorted(self.sizes, key=lambda size: size[0] * size[1])
        by_ratio = sorted(self.sizes, key=lambda size: size[0] / size[1])
        ends = (by_area[0], by_area[-1], by_ratio[0], by_ratio[-1])
        return [self.sizes[size] for size in dict.fromkeys(ends)]


def in_eight_bits(image: PilImage.Image) -> PilImage.Image:
    """Return the image in a mode that Pillow converts well, with values of other ranges scaled to 0…255.

    16-bit values are scaled by their whole range. 32-bit integers are treated as 16-bit values, because files of that
    kind hold such values. Floats are scaled by 255 if all lie in [0, 1], and unchanged if all lie in [0, 255].

    Raises:
        ValueError: there are values outside these ranges.
    """
    if image.mode.startswith(("I", "F")):
        return PilImage.fromarray(np.rint(_scaled(np.asarray(image).astype(np.float64), image.mode)).astype(np.uint8))
    if image.mode == "La":
        return image.convert("LA")
    # Converting a palette with byte transparency directly would give a warning, so it goes through RGBA.
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


def _is_sideways(image: PilImage.Image) -> bool:
    """Return whether the image is shown with width and height exchanged, as its camera recorded."""
    if image.format not in ("JPEG", "MPO") and "exif" not in image.info:  # getexif would decode a PNG
        return False
    return image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS


def _scaled(values: np.ndarray, mode: str) -> np.ndarray:
    low, high = values.min(), values.max()
    if mode != "F":
        if not 0 <= low <= high <= _SIXTEEN_BITS:
            raise ValueError(f"its values lie between {low:g} and {high:g}; only integers from 0 to 65535 can be read")
        return values * (255 / _SIXTEEN_BITS)
    if not 0 <= low <= high <= 255:  # NaN fails too
        raise ValueError(
            f"its values lie between {low:g} and {high:g}; only floats from 0 to 1, or from 0 to 255, can be read"
        )
    return values * 255 if high <= 1 else values


def _ends_as_jpeg(source: str | BytesIO) -> bool:
    if isinstance(source, BytesIO):
        return source.getvalue().endswith(b"\xff\xd9")
    with Path(source).open("rb") as file:
        file.seek(-2, 2)
        return file.read() == b"\xff\xd9"


def processed(processor: Any, images: Sequence[PilImage.Image]) -> torch.Tensor:
    """Run the image processor on a batch of images; returns (B, C, H, W).

    Raises:
        InputError: the processor cannot handle these images, or not in one batch.
    """
    try:
        return processor(images=list(images), return_tensors="pt")["pixel_values"]
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
        sizes = sorted({image.size for image in images})
        shown = ", ".join(f"{width}×{height}" for width, height in sizes[:4])
        raise InputError(
            f"the image processor cannot handle images of {shown} ({images[0].mode}): {first_line(error)}; "
            "see do_resize, size, image_mean and image_std in preprocessor_config.json"
        ) from error


def processed_shape(split: ImageSplit, facts: ImageFacts, processor: Any) -> tuple[int, ...]:
    """Return the shape (C, H, W) that the processor gives all images of a split.

    Raises:
        InputError: the processor cannot handle the images, or gives them different shapes.
    """
    shapes: dict[tuple[int, ...], str] = {}
    for row in facts.extremes:
        image = split.decoded(row)
        shape = tuple(processed(processor, [image]).shape[1:])
        shapes.setdefault(shape, f"row {row} of {split.name} ({image.width}×{image.height}) comes out as {_by(shape)}")
    if len(shapes) > 1:
        raise InputError(
            f"the image processor does not bring images to one size: {', '.join(list(shapes.values())[:2])}; "
            "set do_resize and a size of height and width in preprocessor_config.json, or resize the images"
        )
    return next(iter(shapes))


def check_shape(shape: tuple[int, ...], model_config: PreTrainedConfig, task: Task, trust_remote_code: bool) -> None:
    """Check that the model accepts images of this shape, with a forward pass on the meta device.

    The size in the configuration is not enough to tell, because many models accept other sizes too.

    Raises:
        InputError: the model does not accept images of this shape (C, H, W).
    """
    channels = image_channels(model_config)
    usual = (channels or 3, *(image_size(model_config) or USUAL_IMAGE_SIZE))
    if channels is not None and len(shape) == 3 and shape[0] != channels:
        raise InputError(
            f"the image processor gives images of {shape[0]} channels, but the model takes {channels}; "
            "its preprocessor_config.json belongs to another model"
        )
    model = empty_model(model_config, task, trust_remote_code=trust_remote_code)
    error = _forward_error(model, task, shape)
    # If even the usual size fails, the error says nothing about the shape: some models read values, and there are none.
    if error is not None and shape != usual and _forward_error(model, task, usual) is None:
        raise InputError(
            f"the image processor gives images of {_by(shape)}, which the model does not accept (it expects "
            f"{_by(usual)}): {first_line(error)}; correct size and do_resize in preprocessor_config.json"
        ) from error


def _forward_error(model: torch.nn.Module, task: Task, shape: Sequence[int]) -> Exception | None:
    dtype = next(model.parameters()).dtype
    try:
        with torch.inference_mode():
            task.forward(model, {"pixel_values": torch.empty((1, *shape), dtype=dtype, device="meta")})
    except Exception as error:  # each architecture raises errors of its own
        return error
    return None


def _by(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))
