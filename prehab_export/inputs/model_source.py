"""Checks where a model is, and turns errors of transformers and the hub into clear sentences about that model."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import is_offline_mode
from safetensors import SafetensorError
from transformers.utils import logging

from converters.errors import InputError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def check_location(model: str) -> None:
    """Check that ``model`` is a model folder or a possible hub id, before any library guesses which.

    Raises:
        InputError: it is neither.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{model} has no config.json; give a model folder saved by transformers")
    elif path.exists():
        raise InputError(f"{model} is a file; give the model's folder or its hub id")
    elif model.startswith((".", "~", os.sep)) or not _HUB_ID.fullmatch(model):
        raise InputError(f"no such folder: {model}")


@contextmanager
def readable(model: str, what: str) -> Iterator[None]:
    """Turn an exception of transformers about a missing or broken file into a sentence about this model.

    Args:
        what: the part that is being read, as the message names it.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(_reason(model, what, error)) from error


def _reason(model: str, what: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"{model} comes with its own code, which runs only with --trust-remote-code"
    if Path(model).is_dir():
        return f"cannot read the {what} of {model}: {first_line(error)}"
    if is_offline_mode():
        return f"{model} is neither a local folder nor in the hub's cache, and HF_HUB_OFFLINE is set"
    return f"{model} is not a local folder, and its {what} cannot be read from the hub: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers; real problems are raised as errors here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
