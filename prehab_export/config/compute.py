"""Checks of device names, number formats and amounts of memory, made before any computation starts."""

import re

from converters.errors import InputError
from converters.number_formats import WEIGHT_FORMATS
from prehab_export.config.budget import SIZES, quantity
from prehab_export.config.checks import AUTO, check_choice

DTYPES = (AUTO, *WEIGHT_FORMATS)
PRECISIONS = WEIGHT_FORMATS


def check_device_name(name: str) -> None:
    """Check the name of a device.

    Raises:
        InputError: the name is not ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """
    if name.partition(":")[0] == "mps":
        raise InputError("--device mps has no float64, which decompositions need; use --device cpu")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}")


def check_precision(name: str) -> None:
    """Check the name of a number format for forward passes.

    Raises:
        InputError: the name is not in ``PRECISIONS``.
    """
    check_choice("--precision", name, PRECISIONS)


def memory_bytes(text: str) -> int | None:
    """Parse an amount of memory; None for ``auto``.

    >>> memory_bytes("16GB"), memory_bytes("512MiB"), memory_bytes("auto")
    (16000000000, 536870912, None)

    Raises:
        InputError: the text is neither ``auto`` nor a positive number with a unit.
    """
    return None if text == AUTO else round(1e6 * quantity("--max-memory", text, SIZES, "16GB"))
