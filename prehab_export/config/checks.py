"""Checks of values that several options share. Each raises an `InputError` that names the option."""

from typing import Any

from converters.errors import InputError

AUTO = "auto"


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise an `InputError` unless the value is one of the choices."""
    if value not in choices:
        raise InputError(f"{option} must be one of {', '.join(choices)}, not {value!r}")


def check_minimum(option: str, value: int | None, minimum: int) -> None:
    """Raise an `InputError` if the value is below the minimum; None passes."""
    if value is not None and value < minimum:
        raise InputError(f"{option} must be {minimum} or more, not {value}")


def check_share(option: str, value: Any) -> None:
    """Raise an `InputError` unless the value lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise InputError(f"{option} must lie between 0 and 1, not {value}")
