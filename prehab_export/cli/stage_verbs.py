"""``run`` and the verbs of its stages: each brings a run's folder up to date through one stage."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from converters.errors import InputError
from prehab_export.cli.groups import Decorator, decorated, help_text, titled
from prehab_export.cli.options import (
    BENCH,
    CALIBRATION,
    EXPORT,
    PREHAB,
    QUANTISATION,
    REFINEMENT,
    REHAB,
    TRUNCATION,
    flags_through,
    with_flags,
)
from prehab_export.cli.parsing import requested
from prehab_export.config import RunConfig
from prehab_export.pipeline import DEPENDENCIES

STAGE_NOTE = """Works on the folder of a run, given as MODEL or with -o, with the options saved there unless others are
given; earlier stages are brought up to date first. With a model and -o it starts a new run and stops here."""


@dataclass(frozen=True)
class StageVerb:
    """A verb that ends with a stage.

    until: the last stage that it brings up to date. redo: the stages that --force does again. titles: of its own
    options, which stand before those of earlier stages. short: for the list of verbs. text: for its own help. further:
    what it can do besides; returns True where that is all there is to do.
    """

    name: str
    until: str
    redo: tuple[str, ...]
    titles: tuple[str, ...]
    short: str
    text: str
    examples: tuple[str, ...]
    options: Decorator = lambda command: command
    further: Callable[[dict[str, Any]], bool] = lambda _given: False

    @property
    def is_whole(self) -> bool:
        """Whether it is everything, and begins with a model rather than with a run."""
        return self.name == "run"

    def __call__(self, **given: Any) -> None:
        if self.further(given):
            return
        config, output = requested(given, inherit=not self.is_whole)
        until, redo = self.until, self.redo if given["force"] else ()
        if until == "baseline" and config.ort:
            until, redo = "ort", (*redo, "ort") if given["force"] else ()  # made of a graph that has been verified
        if given["dry_run"]:
            show_forecast(config, output, until, redo, given["as_json"])
            return
        from prehab_export.pipeline import check_speed
        from prehab_export.pipeline import run as run_pipeline

        workspace = run_pipeline(config, output, until=until, redo=redo)
        show_result(workspace, self.name, given["as_json"])
        if config.min_speedup is not None and until in ("bench", "report"):
            check_speed(workspace, config.min_speedup)


def as_command(verb: StageVerb) -> Callable[..., None]:
    """What click makes a command of: the verb as a function, with its help text and its options."""

    def command(**given: Any) -> None:
        verb(**given)

    note = "" if verb.is_whole else STAGE_NOTE
    command.__doc__ = help_text(f"{verb.text}\n\n{note}", *verb.examples)
    first = {title: place - len(verb.titles) for place, title in enumerate(verb.titles)}
    flags = sorted(flags_through(verb.until), key=lambda flag: first.get(flag.title, 0))
    ways = (common_options, work_options, AS_JSON, verb.options, with_flags(flags))
    return decorated(click.argument("model", required=False), *ways)(command)


common_options = decorated(
    click.option("-o", "--output", type=click.Path(path_type=Path), metavar="OUT", help="The run's folder."),
    click.option(
        "--config",
        "config_file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Options as YAML, in the shape of a saved run.yaml; they win over saved ones.",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any option by its name in the YAML file, such as truncate.floor_share=0.2; `prehab-export options` lists "
        "them. Repeat for more.",
    ),
    click.option(
        "--unset",
        multiple=True,
        metavar="KEY",
        help="Take a saved option, or a section of them, back to its default, such as quantize or prehab. Repeat for "
        "more.",
    ),
)
work_options = decorated(
    click.option("--force", is_flag=True, help="Do this verb's work again although it is up to date."),
    click.option(
        "--dry-run",
        is_flag=True,
        help="Only tell what would be done: ranks, sizes, memory, disk and time. Nothing is written.",
    ),
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")


def show_result(workspace: Any, verb: str, as_json: bool) -> None:
    from prehab_export.cli.tables.summary import print_summary
    from prehab_export.pipeline import result_of

    if as_json:
        click.echo(json.dumps(result_of(workspace, verb), indent=2))
    else:
        print_summary(workspace, verb)


def show_forecast(config: RunConfig, output: Path, until: str, redo: tuple[str, ...], as_json: bool) -> None:
    from prehab_export.cli.tables.forecast import print_forecast
    from prehab_export.pipeline import forecast

    found = forecast(config, output, until=until, redo=redo)
    if as_json:
        click.echo(json.dumps(found.facts(), indent=2))
    else:
        print_forecast(found)


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
    from prehab_export.pipeline import Target, bench_on_target

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
        from prehab_export.pipeline import read_back

        config, output = requested(given)
        read_back(config, output, given["target_results"])
    return False


_STEPS = ", ".join(name for name in DEPENDENCIES if name not in ("merge", "times", "baseline", "artifact"))
WHOLE = StageVerb(
    "run",
    "report",
    ("verify", "artifact", "bench", "report"),  # what is measured rather than computed
    (),
    "Everything: from a model to a verified artifact and a report.",
    f"""Everything, as far as it is wanted: {_STEPS}.

MODEL is a local folder or a hub id, or the folder of an earlier run to go on with.""",
    (
        "run my-bert -o out --task text-classification --data reviews.csv --ratio 0.6",
        "run my-bert -o out --task text-classification --data reviews.csv --dry-run",
        "run out --quantize int8",
        "run --config out/run.yaml -o another",
    ),
)
STAGE_VERBS = (
    StageVerb(
        "calibrate",
        "calibrate",
        ("calibrate",),
        (CALIBRATION,),
        "Gather second moments of each layer's input and gradient.",
        """Gather second moments of what flows into each targeted layer (C, with its mean) and of the gradient at its
output (G), on a small sample.""",
        ("calibrate my-bert -o out --task text-classification --data reviews.csv", "calibrate out --exclude '*.0.*'"),
    ),
    StageVerb(
        "prehab",
        "prehab",
        ("prehab",),
        (PREHAB, TRUNCATION),
        "Fine-tune towards weights that truncation hurts less.",
        """Fine-tune towards weights that truncation hurts less: task loss plus λ times a smooth stand-in for rank. Kept
only if the truncated model is better for it.""",
        ("prehab out --prehab-steps 256 --prehab-lambda auto",),
    ),
    StageVerb(
        "truncate",
        "truncate",
        ("truncate",),
        (TRUNCATION,),
        "Choose ranks and cut every targeted layer into two factors.",
        """Choose ranks and cut every targeted layer into two factors, in closed form, block by block.""",
        ("truncate out --ratio 0.8", "truncate out --budget latency:0.5"),
    ),
    StageVerb(
        "refine",
        "refine",
        ("refine",),
        (REFINEMENT,),
        "Tune the factors towards the dense model, without labels.",
        """Tune the factors towards the dense model's output, end to end, without labels.""",
        ("refine out --refine-steps 500",),
    ),
    StageVerb(
        "rehab",
        "rehab",
        ("rehab",),
        (REHAB,),
        "Train the factors for a few steps, with labels.",
        """Train the factors for a few steps, with labels; each part is kept only if it helps.""",
        ("rehab out --rehab-steps 100",),
    ),
    StageVerb(
        "export",
        "baseline",
        ("export", "baseline"),
        (EXPORT,),
        "Write the compressed folder and graph, and the dense twin.",
        """Write the compressed folder and ONNX graph, and the dense twin.""",
        ("export out --dtype bfloat16", "export out --ort"),
    ),
    StageVerb(
        "verify",
        "artifact",
        ("verify", "artifact"),
        (),
        "Reopen it all in a fresh process, check it, publish it.",
        """Reopen what was written in a fresh process, check it, and publish it.""",
        ("verify out",),
    ),
    StageVerb(
        "quantize",
        "quantize",
        ("quantize",),
        (QUANTISATION,),
        "Write smaller graphs, compressed and dense, and judge them.",
        """Write int8, int4 or float16 graphs, compressed and dense, and measure what they cost.""",
        ("quantize out --quantize int8 --quantize int4",),
    ),
    StageVerb(
        "bench",
        "bench",
        ("bench",),
        (BENCH,),
        "Measure latency and memory beside the dense model.",
        """Measure latency and memory beside the dense model, here or elsewhere.""",
        (
            "bench out --threads 4 --bench-batch 1 --bench-batch 8",
            "bench out --min-speedup 1.2",
            "bench out --target ssh://user@board",
        ),
        target_options,
        measured_elsewhere,
    ),
    StageVerb(
        "report",
        "report",
        ("verify", "artifact", "bench", "report"),
        (),
        "Write report.json, report.md and the plots.",
        """Write report.json, report.md and the plots.""",
        ("report out", "report out --target-results results.json"),
        result_options,
        taken_in,
    ),
)
