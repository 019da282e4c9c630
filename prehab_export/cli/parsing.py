"""What a command line asks for: saved options, then a YAML file, less what is unset, then ``--set`` and flags."""

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

# Keys that must be given, and how.
REQUIRED = {"model": "MODEL", "task": "--task", "data.data": "--data"}


def requested(given: Mapping[str, Any], *, inherit: bool = True) -> tuple[RunConfig, Path]:
    """The options and the folder that a command line means.

    Args:
        given: a command's parameters by name: ``model``, ``output``, ``config_file``, ``settings``, ``unset``, and the
            flags that it has.
        inherit: go on with the options that are saved in the folder, also where a model is given. Without a model they
            are gone on with anyway.

    Raises:
        InputError: an unknown option, a wrong value, one that must be given and is not, or two that contradict each
            other.
    """
    from prehab_export.pipeline import OPTIONS_FILE

    model, output = given["model"], given["output"]
    if model is not None and (Path(model) / OPTIONS_FILE).is_file():
        if output is not None and output.resolve() != Path(model).resolve():
            raise InputError(f"{model} is the folder of a run; give a model, or leave out -o")
        output, model = Path(model), None
    if output is None:
        raise InputError("give the run's folder with -o OUT")
    written = {} if given["config_file"] is None else read_options(given["config_file"])
    inherit = inherit or (model is None and "model" not in written)
    saved = read_options(output / OPTIONS_FILE) if inherit and (output / OPTIONS_FILE).is_file() else {}
    values = merged(saved, written)
    for name in given["unset"]:
        values = without(values, _named(name))
    for path, value in _explicit(model, given).items():
        values = with_value(values, path, value)
    return with_absolute_paths(from_dict(RunConfig, _complete(values))), output


def _explicit(model: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Key → value, of what this command line sets itself."""
    settings = _settings(given["settings"])
    flags = {flag.path: flag for flag in FLAGS if given.get(flag.parameter) not in (None, ())}
    spelled = {path: f"--{flag.names[0]}" for path, flag in flags.items()}
    values = {path: given[flag.parameter] for path, flag in flags.items()}
    if model is not None:
        spelled["model"], values["model"] = "MODEL", model
    if twice := [path for path in settings if path in values]:
        raise InputError(f"{twice[0]} is given both by {spelled[twice[0]]} and by --set; give one of them")
    return values | settings


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """Key → value, of all that ``--set`` gives."""
    values: dict[str, Any] = {}
    for text in texts:
        name = text.partition("=")[0].strip()
        if name not in known_keys() and (path := _flagged(name)) is not None:
            raise InputError(f"unknown option {name}; did you mean {path}?")
        path, value = read_setting(text)
        if path in values:
            raise InputError(f"--set gives {path} twice; give it once")
        values[path] = value
    return values


def _flagged(name: str) -> str | None:
    """The key of a flag that is spelled like this, or as a key would be: ``prehab.lambda`` of ``--prehab-lambda``."""
    return flag_paths().get(name.lstrip("-").replace(".", "-").replace("_", "-"))


def _named(name: str) -> str:
    """The key, or the section, that somebody wants to take back, by its own name or by that of its flag.

    Raises:
        InputError: there is no such option.
    """
    if (path := flag_paths().get(name.lstrip("-"))) is not None:
        return path
    if name in known_keys() or (name and name in sections()):
        return name
    near = [*difflib.get_close_matches(name.lstrip("-"), flag_paths(), n=1), _flagged(name), nearest(name)]
    advice = next((f"; did you mean {guess}?" for guess in near if guess), ", as in --unset quantize")
    raise InputError(f"--unset {name}: that is no option with a saved value{advice}")


def _complete(values: dict[str, Any]) -> dict[str, Any]:
    for path, way in REQUIRED.items():
        section, _, name = path.rpartition(".")
        if name not in (values.get(section, {}) if section else values):
            raise InputError(f"{way} is not given, neither on the command line, in a YAML file nor in a saved run")
    return values
