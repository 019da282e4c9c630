"""``run`` and the verbs of its stages: each brings a run's folder up to date through one stage."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from prehab_export.cli.common import AS_JSON, common_options, work_options
from prehab_export.cli.elsewhere import measured_elsewhere, result_options, taken_in, target_options
from prehab_export.cli.groups import Decorator, decorated, help_text
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
    own = [flag for flag in flags if flag.title in verb.titles]
    shared = [flag for flag in flags if flag.title not in verb.titles]
    ways = (common_options, work_options, AS_JSON, with_flags(own), verb.options, with_flags(shared))
    return decorated(click.argument("model", required=False), *ways)(command)


def show_result(workspace: Any, verb: str, as_json: bool) -> None:
    from prehab_export.cli.tables.summary import print_summary
    from prehab_export.pipeline import read_result

    if as_json:
        click.echo(json.dumps(read_result(workspace, verb), indent=2))
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
        """Gather second moments of what flows into each selected layer (C, with its mean) and of the gradient at its
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
        "Choose ranks and cut every selected layer into two factors.",
        """Choose ranks and cut every selected layer into two factors, in closed form, block by block.""",
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
