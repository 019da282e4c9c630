"""Images as the model takes them: decoded, in 8 bits a channel, and found sound before anything slow starts.

Transparency is dropped, as transformers' own loading does: the colours beneath it show. Values of more than 8 bits are
scaled by the range of their type, not by what an image happens to hold, so that a dark image stays dark.
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

# So many rows of a split are looked at before work starts; damage further on is found when the row is used.
MOST_CHECKED = 20_000
_ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
# What Pillow converts without loss of range or a doubt.
_PLAIN_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})
_SIXTEEN_BITS = 65535
_LYING = (5, 6, 7, 8)  # EXIF's orientations with rows for columns
# What Pillow raises for damaged files.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, PilImage.DecompressionBombError)


@dataclass(frozen=True)
class ImageSplit:
    """The images of a split's rows. mode: ``L`` for a model of one channel, else ``RGB``. declared: the mode that the
    data says its images are to be read in, if it says so."""

    rows: Dataset
    column: str
    mode: str
    declared: str | None
    name: str

    @classmethod
    def of(cls, rows: Dataset, column: str, model_config: PreTrainedConfig, split: str) -> "ImageSplit":
        feature = rows.features[column]
        declared = feature.mode if isinstance(feature, Image) else None
        # Decoded as they are: Pillow would clip what has more than 8 bits.
        images = rows.select_columns([column]).cast_column(column, Image(mode=None))
        return cls(images, column, "L" if image_channels(model_config) == 1 else "RGB", declared, split)

    def decoded(self, row: int) -> PilImage.Image:
        """Raises:
        InputError: there is no image, or it cannot be read; the message names the row, and the file if there is one.
        """
        try:
            image = self.rows[row][self.column]
            if image is None:
                raise OSError("there is none")
            return self._converted(image)
        except _DAMAGED as error:
            raise self._unreadable(row, error) from error

    def check(self) -> "ImageFacts":
        """Look at the first `MOST_CHECKED` images without decoding more than needed.

        Raises:
            InputError: as ``decoded``.
        """
        files = self.rows.cast_column(self.column, Image(decode=False))
        count = min(MOST_CHECKED, len(files))
        shapes: dict[tuple[int, int], int] = {}
        transparent = row = 0
        with bar(f"check images of {self.name}", count) as advance:
            for batch in files.select(range(count)).iter(batch_size=100):
                for file in batch[self.column]:
                    try:
                        size, has_alpha = self._look(row, file)
                    except _DAMAGED as error:
                        raise self._unreadable(row, error) from error
                    shapes.setdefault(size, row)
                    transparent += has_alpha
                    row += 1
                advance(len(batch[self.column]))
        return ImageFacts(shapes, transparent, count)

    def _look(self, row: int, file: dict[str, Any] | None) -> tuple[tuple[int, int], bool]:
        """Size, and whether it has transparency."""
        if file is None:
            raise OSError("there is none")
        if file["bytes"] is None and "://" in file["path"]:  # inside an archive, or on the hub
            return self.decoded(row).size, False
        source = file["path"] if file["bytes"] is None else BytesIO(file["bytes"])
        with PilImage.open(source) as image:
            has_alpha, lies = image.mode in _ALPHA_MODES or "transparency" in image.info, _lies(image)
            if image.mode not in _PLAIN_MODES:
                self._converted(image)
            elif image.format == "PNG":
                image.verify()  # the checksums of all chunks
            elif image.format != "JPEG" or not _ends_as_jpeg(source):
                image.load()
            size = image.size  # as loading leaves it, which turns TIFF files
        return size[::-1] if lies else size, has_alpha

    def _converted(self, image: PilImage.Image) -> PilImage.Image:
        image = in_eight_bits(image)
        return (image if self.declared is None else image.convert(self.declared)).convert(self.mode)

    def _unreadable(self, row: int, error: Exception) -> InputError:
        file = self.rows.cast_column(self.column, Image(decode=False))[row][self.column]
        path = f", {file['path']}" if file and file.get("path") else ""
        reason = "it is no image of a known kind" if isinstance(error, UnidentifiedImageError) else str(error)
        return InputError(
            f"row {row} of {self.name}{path}: cannot read the image in column {self.column!r}: {reason}; "
            "mend it or take it out"
        )


@dataclass(frozen=True)
class ImageFacts:
    """sizes: (width, height) → a row that has it. transparent: how many of ``checked`` images have transparency."""

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
        """Rows of the smallest, largest, widest and tallest image: what makes equal shapes of these does so of all."""
        by_area = sorted(self.sizes, key=lambda size: size[0] * size[1])
        by_ratio = sorted(self.sizes, key=lambda size: size[0] / size[1])
        ends = (by_area[0], by_area[-1], by_ratio[0], by_ratio[-1])
        return [self.sizes[size] for size in dict.fromkeys(ends)]


def in_eight_bits(image: PilImage.Image) -> PilImage.Image:
    """The image in a mode that Pillow converts well, values of other ranges scaled to 0…255.

    16 bits: by their whole range. Whole numbers of 32 bits: as 16 bits, which is what files of that kind hold. Floats:
    by 255 where all lie in [0, 1], as they are where all lie in [0, 255].

    Raises:
        ValueError: values outside these ranges.
    """
    if image.mode.startswith(("I", "F")):
        return PilImage.fromarray(np.rint(_scaled(np.asarray(image).astype(np.float64), image.mode)).astype(np.uint8))
    if image.mode == "La":
        return image.convert("LA")
    # By way of RGBA: a palette that has transparency in bytes is converted with a warning otherwise.
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


def _lies(image: PilImage.Image) -> bool:
    """Whether the image is shown with sides exchanged: cameras note how they were held."""
    if image.format not in ("JPEG", "MPO") and "exif" not in image.info:  # asking would decode a PNG
        return False
    return image.getexif().get(ExifTags.Base.Orientation) in _LYING


def _scaled(values: np.ndarray, mode: str) -> np.ndarray:
    low, high = values.min(), values.max()
    if mode != "F":
        if not 0 <= low <= high <= _SIXTEEN_BITS:
            raise ValueError(f"its values lie between {low:g} and {high:g}; whole numbers from 0 to 65535 are read")
        return values * (255 / _SIXTEEN_BITS)
    if not 0 <= low <= high <= 255:  # NaN fails too
        raise ValueError(f"its values lie between {low:g} and {high:g}; floats from 0 to 1, or from 0 to 255, are read")
    return values * 255 if high <= 1 else values


def _ends_as_jpeg(source: str | BytesIO) -> bool:
    if isinstance(source, BytesIO):
        return source.getvalue().endswith(b"\xff\xd9")
    with Path(source).open("rb") as file:
        file.seek(-2, 2)
        return file.read() == b"\xff\xd9"


def processed(processor: Any, images: Sequence[PilImage.Image]) -> torch.Tensor:
    """What the image processor makes of a batch (B, C, H, W).

    Raises:
        InputError: it cannot take these images, or not together.
    """
    try:
        return processor(images=list(images), return_tensors="pt")["pixel_values"]
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
        sizes = sorted({image.size for image in images})
        shown = ", ".join(f"{width}×{height}" for width, height in sizes[:4])
        raise InputError(
            f"the image processor cannot take images of {shown} ({images[0].mode}): {first_line(error)}; "
            "see do_resize, size, image_mean and image_std in preprocessor_config.json"
        ) from error


def processed_shape(split: ImageSplit, facts: ImageFacts, processor: Any) -> tuple[int, ...]:
    """The one shape that the processor gives all images of a split.

    Raises:
        InputError: it cannot take them, or gives them different shapes.
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
    """Hold what the processor gives to what the model takes, by a forward pass without weights or data.

    A size in the configuration does not decide: many models take others, too.

    Raises:
        InputError: the model does not take images of this shape (C, H, W).
    """
    channels = image_channels(model_config)
    usual = (channels or 3, *(image_size(model_config) or USUAL_IMAGE_SIZE))
    if channels is not None and len(shape) == 3 and shape[0] != channels:
        raise InputError(
            f"the image processor gives images of {shape[0]} channels, the model takes {channels}; "
            "its preprocessor_config.json belongs to another model"
        )
    model = empty_model(model_config, task, trust_remote_code=trust_remote_code)
    error = _forward_error(model, task, shape)
    # Where not even its own size passes, nothing is learnt: some code looks at values, and there are none.
    if error is not None and shape != usual and _forward_error(model, task, usual) is None:
        raise InputError(
            f"the image processor gives images of {_by(shape)}, which the model does not take (its own are "
            f"{_by(usual)}): {first_line(error)}; mend size and do_resize in preprocessor_config.json"
        ) from error


def _forward_error(model: torch.nn.Module, task: Task, shape: Sequence[int]) -> Exception | None:
    dtype = next(model.parameters()).dtype
    try:
        with torch.inference_mode():
            task.forward(model, {"pixel_values": torch.empty((1, *shape), dtype=dtype, device="meta")})
    except Exception as error:  # every architecture has its own way of saying so
        return error
    return None


def _by(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))
