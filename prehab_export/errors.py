"""Errors with an exit code. Anything else that escapes is a defect and ends with exit code 1."""

from converters.errors import InputError


class ParityError(RuntimeError):
    """A written artifact does not compute what the model in memory computes; nothing was published."""

    exit_code = 3


class BudgetError(RuntimeError):
    """All is done, but the result is not within what was asked for."""

    exit_code = 4


class TargetError(RuntimeError):
    """The place to measure at cannot be reached, lacks something, or was lost on the way."""

    exit_code = 5


__all__ = ["BudgetError", "InputError", "ParityError", "TargetError"]
