"""``bench --target`` and ``report --target-results``: what is measured in another place, and read back."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from converters.errors import InputError
from prehab_export.cli.groups import decorated, titled
from prehab_export.cli.parsing import requested

ELSEWHERE = "Measuring elsewhere"
_elsewhere = partial(titled, ELSEWHERE)
target_options = decorated(
    _elsewhere("--target", metavar="TARGET", help="local, kit:FOLDER, ssh://user@host, adb, adb:SERIAL or browser."),
    _elsewhere("--python", default="python3", show_default=True, metavar="COMMAND", help="Interpreter over there."),
    _elsewhere("--keep", is_flag=True, help="Leave the kit over there, to copy less the next time."),
    _elsewhere("--cooldown", type=float, default=0.0, metavar="SECONDS", help="Rest before each turn."),
    _elsewhere("--pin-cores", type=int, metavar="N", help="Run on so many cores only (local)."),
    _elsewhere("--memory-limit", type=float, metavar="MB", help="Memory to run in (local)."),
    _elsewhere(
        "--matrix",
        type=float,
        multiple=True,
        metavar="MB",
        help="Memory of a column in a table threads × memory (local), such as 128; repeat for more.",
    ),
    _elsewhere("--browser", metavar="COMMAND", help="The browser (browser); found when not given."),
    _elsewhere(
        "--ort-web",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="The dist folder of onnxruntime-web (browser).",
    ),
    _elsewhere("--by-hand", is_flag=True, help="Serve the page to any browser, until Ctrl-C (browser)."),
    _elsewhere("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="To serve at by hand."),
    _elsewhere("--port", type=int, default=0, metavar="N", help="To serve at by hand; a free one by default."),
)
# Option of bench → field of ``Target``.
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


def measured_elsewhere(given: dict[str, Any]) -> bool:
    """Measure at the target that was asked for; False where none was."""
    if given["target"] is None:
        defaults = (None, False, (), 0, "python3", "127.0.0.1")
        if meant := [name for name in TARGET_FIELDS if given[name] not in defaults]:
            raise InputError(f"--{meant[0].replace('_', '-')} needs --target")
        return False
    if given["dry_run"]:
        raise InputError("--dry-run tells nothing of other places; leave out --target")
    from prehab_export.config import Target
    from prehab_export.pipeline import bench_on_target

    target = Target(**{field: given[name] for name, field in TARGET_FIELDS.items()})
    config, output = requested(given)
    place = bench_on_target(config, output, target)
    if place.is_dir():
        told = json.dumps({"kit": str(place)}, indent=2)
        click.echo(told if given["as_json"] else f"kit  {place}\nrun it there with  python run_kit.py")
        return True
    from prehab_export.cli.tables.target import print_results

    results = json.loads(place.read_text(encoding="utf-8"))
    if given["as_json"]:
        click.echo(json.dumps(results, indent=2))
    else:
        print_results(results)
        click.echo(f"results  {place}")
    return True


result_options = titled(
    ELSEWHERE,
    "--target-results",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    metavar="FILE",
    help="results.json of a kit that was run by hand; repeat for more.",
)


def taken_in(given: dict[str, Any]) -> bool:
    """Read back what kits have measured elsewhere; the report is then written as always."""
    if given["target_results"] and not given["dry_run"]:
        from prehab_export.pipeline import import_results

        config, output = requested(given)
        import_results(config, output, given["target_results"])
    return False
