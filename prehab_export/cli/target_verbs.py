"""The options of ``bench --target`` and ``report --target-results``, and the work behind them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from converters.errors import InputError
from prehab_export.cli.groups import chain, titled_option
from prehab_export.cli.parsing import parse_request

TARGET_TITLE = "Measuring elsewhere"
_target_option = partial(titled_option, TARGET_TITLE)
target_options = chain(
    _target_option(
        "--target", metavar="TARGET", help="local, kit:FOLDER, ssh://user@host, adb, adb:SERIAL or browser."
    ),
    _target_option(
        "--python", default="python3", show_default=True, metavar="COMMAND", help="Python interpreter at the target."
    ),
    _target_option("--keep", is_flag=True, help="Leave the kit at the target, so that the next run copies less."),
    _target_option("--cooldown", type=float, default=0.0, metavar="SECONDS", help="Pause before each measurement."),
    _target_option("--pin-cores", type=int, metavar="N", help="Number of cores to use (local)."),
    _target_option("--memory-limit", type=float, metavar="MB", help="Memory limit (local)."),
    _target_option(
        "--matrix",
        type=float,
        multiple=True,
        metavar="MB",
        help="Memory limit of a column in a table of threads × memory (local), such as 128; repeat for more.",
    ),
    _target_option("--browser", metavar="COMMAND", help="Command of the browser (browser); detected by default."),
    _target_option(
        "--ort-web",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="The dist folder of onnxruntime-web (browser).",
    ),
    _target_option("--by-hand", is_flag=True, help="Serve the page to any browser, until Ctrl-C (browser)."),
    _target_option(
        "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to serve at (by hand)."
    ),
    _target_option(
        "--port", type=int, default=0, metavar="N", help="Port to serve at (by hand); a free port by default."
    ),
)
# The field of ``Target`` that each option of bench sets.
TARGET_FIELDS = {
    "target": "name",
    "python": "python",
    "keep": "keep",
    "cooldown": "cooldown_s",
    "pin_cores": "pin",
    "memory_limit": "memory_mb",
    "matrix": "matrix_memory_mb",
    "browser": "browser",
    "ort_web": "web",
    "by_hand": "by_hand",
    "host": "host",
    "port": "port",
}


def bench_at_target(parameters: dict[str, Any]) -> bool:
    """Measure at the target and print the results. Return False if the command line gives no target.

    Raises:
        InputError: an option of targets is given without ``--target``, or ``--dry-run`` is given with it.
    """
    if parameters["target"] is None:
        defaults = (None, False, (), 0, "python3", "127.0.0.1")
        if names := [name for name in TARGET_FIELDS if parameters[name] not in defaults]:
            raise InputError(f"--{names[0].replace('_', '-')} needs --target")
        return False
    if parameters["dry_run"]:
        raise InputError("--dry-run does not cover measurements at a target; leave out --target")
    from prehab_export.config import Target
    from prehab_export.pipeline import bench_on_target

    target = Target(**{field: parameters[name] for name, field in TARGET_FIELDS.items()})
    config, output = parse_request(parameters)
    path = bench_on_target(config, output, target)
    if path.is_dir():
        as_json = json.dumps({"kit": str(path)}, indent=2)
        click.echo(as_json if parameters["as_json"] else f"kit  {path}\nrun it there with  python run_kit.py")
        return True
    from prehab_export.cli.tables.target import print_results

    results = json.loads(path.read_text(encoding="utf-8"))
    if parameters["as_json"]:
        click.echo(json.dumps(results, indent=2))
    else:
        print_results(results)
        click.echo(f"results  {path}")
    return True


result_options = titled_option(
    TARGET_TITLE,
    "--target-results",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    metavar="FILE",
    help="The results.json of a kit that was run by hand; repeat for more.",
)


def read_target_results(parameters: dict[str, Any]) -> bool:
    """Copy the results of kits into the run's folder. Return False, because the report still has to be written."""
    if parameters["target_results"] and not parameters["dry_run"]:
        from prehab_export.pipeline import import_results

        config, output = parse_request(parameters)
        import_results(config, output, parameters["target_results"])
    return False
