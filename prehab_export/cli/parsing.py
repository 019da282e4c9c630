"""The parser of a run's options from a command line.

The options come from the saved options, the YAML file, and ``--set`` and flags, where each source overrides the sources
before it. ``--unset`` applies after the YAML file.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.errors import InputError
from prehab_export.cli.options import FLAGS, flag_paths
from prehab_export.config import (
    RunConfig,
    from_dict,
    known_keys,
    merged,
    nearest,
    read_options,
    read_setting,
    sections,
    with_absolute_paths,
    with_value,
    without,
)

# The required keys, with the argument or flag that sets each.
REQUIRED = {"model": "MODEL", "task": "--task", "data.data": "--data"}


def parse_request(parameters: Mapping[str, Any], *, inherit: bool = True) -> tuple[RunConfig, Path]:
    """Return the options and the folder of the run that a command line describes.

    Args:
        parameters: the command's parameters by name: ``model``, ``output``, ``config_file``, ``settings``, ``unset``,
            and the command's flags.
        inherit: start from the options saved in the folder even if the command line gives a model. Without a model,
            the saved options always apply.

    Raises:
        InputError: an option is unknown, has an invalid value, is missing, or contradicts another option.
    """
    from prehab_export.pipeline import OPTIONS_FILE

    model, output = parameters["model"], parameters["output"]
    if model is not None and (Path(model) / OPTIONS_FILE).is_file():
        if output is not None and output.resolve() != Path(model).resolve():
            raise InputError(f"{model} is the folder of a run; give a model, or leave out -o")
        output, model = Path(model), None
    if output is None:
        raise InputError("give the run's folder with -o OUT")
    config_file = parameters["config_file"]
    file_values = {} if config_file is None else read_options(config_file)
    inherit = inherit or (model is None and "model" not in file_values)
    saved = read_options(output / OPTIONS_FILE) if inherit and (output / OPTIONS_FILE).is_file() else {}
    values = merged(saved, file_values)
    for name in parameters["unset"]:
        values = without(values, _resolve_key(name))
    for path, value in _command_line_values(model, parameters).items():
        values = with_value(values, path, value)
    _check_required(values)
    return with_absolute_paths(from_dict(RunConfig, values)), output


def _command_line_values(model: str | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the command line itself sets, by key."""
    settings = _parse_settings(parameters["settings"])
    flags = {flag.path: flag for flag in FLAGS if parameters.get(flag.parameter) not in (None, ())}
    spellings = {path: f"--{flag.names[0]}" for path, flag in flags.items()}
    values = {path: parameters[flag.parameter] for path, flag in flags.items()}
    if model is not None:
        spellings["model"], values["model"] = "MODEL", model
    if duplicates := [path for path in settings if path in values]:
        path = duplicates[0]
        raise InputError(f"{path} is given both by {spellings[path]} and by --set; give it only once")
    return values | settings


def _parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Return the values of all ``--set`` options, by key."""
    values: dict[str, Any] = {}
    for text in texts:
        name = text.partition("=")[0].strip()
        if name not in known_keys() and (path := _key_of_flag(name)) is not None:
            raise InputError(f"unknown option {name}; did you mean {path}?")
        path, value = read_setting(text)
        if path in values:
            raise InputError(f"--set gives {path} twice; give it once")
        values[path] = value
    return values


def _key_of_flag(name: str) -> str | None:
    """Return the key that a flag sets, or None if there is no such flag.

    The name may have the form of a key: ``prehab.lambda`` stands for ``--prehab-lambda``.
    """
    return flag_paths().get(name.lstrip("-").replace(".", "-").replace("_", "-"))


def _resolve_key(name: str) -> str:
    """Return the key or section for an argument of ``--unset``, which may be a key, a section or the name of a flag.

    Raises:
        InputError: there is no such option.
    """
    if (path := flag_paths().get(name.lstrip("-"))) is not None:
        return path
    if name in known_keys() or (name and name in sections()):
        return name
    guesses = [*difflib.get_close_matches(name.lstrip("-"), flag_paths(), n=1), _key_of_flag(name), nearest(name)]
    advice = next((f"; did you mean {guess}?" for guess in guesses if guess), ", as in --unset quantize")
    raise InputError(f"--unset {name}: this is not an option with a saved value{advice}")


def _check_required(values: dict[str, Any]) -> None:
    for path, argument in REQUIRED.items():
        section, _, name = path.rpartition(".")
        if name not in (values.get(section, {}) if section else values):
            raise InputError(f"{argument} is missing; give it on the command line, in a YAML file or with a saved run")
