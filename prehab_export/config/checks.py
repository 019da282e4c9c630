"""Checks that several options share; each raises an `InputError` that names the option."""

from typing import Any

from converters.errors import InputError

AUTO = "auto"


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{option} must be one of {', '.join(allowed)}, not {value!r}")


def at_least(option: str, value: int | None, lowest: int) -> None:
    if value is not None and value < lowest:
        raise InputError(f"{option} must be {lowest} or more, not {value}")


def check_share(option: str, value: Any) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{option} must lie between 0 and 1, not {value}")
