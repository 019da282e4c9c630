"""Define the error for wrong input. Its messages say what was wrong, where, and how to fix it."""


class InputError(ValueError):
    """The request cannot be carried out: a path, name, shape or value is wrong."""

    exit_code = 2
