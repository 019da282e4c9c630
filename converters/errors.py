"""The errors a caller is meant to read. Each message says what was wrong, where, and how to mend it."""


class InputError(ValueError):
    """The request cannot be carried out as given: a wrong path, name, shape or value."""

    exit_code = 2
