"""Names of devices and number formats, checked before anything is computed."""

import re

from converters.errors import InputError
from converters.number_formats import WEIGHT_FORMATS
from prehab_export.config.checks import AUTO, one_of

DTYPES = (AUTO, *WEIGHT_FORMATS)
PRECISIONS = WEIGHT_FORMATS


def check_device_name(name: str) -> None:
    """Raises:
    InputError: neither ``auto``, ``cpu``, ``cuda`` nor ``cuda:N``.
    """
    if name.partition(":")[0] == "mps":
        raise InputError("--device mps has no float64, which decompositions need; take --device cpu")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}")


def check_precision(name: str) -> None:
    """Raises:
    InputError: not one of ``PRECISIONS``.
    """
    one_of("--precision", name, PRECISIONS)
