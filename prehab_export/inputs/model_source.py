"""Where a model is, and what transformers and the hub say when it cannot be read, in sentences of our own."""

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
    """Refuse what is neither a model folder nor a possible hub id, before any library guesses."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{model} has no config.json; give a model folder as transformers saves it")
    elif path.exists():
        raise InputError(f"{model} is a file; give the model's folder or its hub id")
    elif model.startswith((".", "~", os.sep)) or not _HUB_ID.fullmatch(model):
        raise InputError(f"no such folder: {model}")


@contextmanager
def readable(model: str, what: str) -> Iterator[None]:
    """Turn what transformers raises for a missing or broken file into a sentence about this model."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(_reason(model, what, error)) from error


def _reason(model: str, what: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"{model} comes with its own code, which is not run unless --trust-remote-code is given"
    if Path(model).is_dir():
        return f"cannot read the {what} of {model}: {first_line(error)}"
    if is_offline_mode():
        return f"{model} is not a folder here nor in the hub's cache, and HF_HUB_OFFLINE is set"
    return f"{model} is not a folder here, and the hub does not give its {what}: {first_line(error)}"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no warnings from transformers: what they would say is raised as an error here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
