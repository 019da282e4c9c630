"""``run`` and the verbs of its stages. Each verb brings the folder of a run up to date through one stage."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from prehab_export.cli.common import AS_JSON, common_options, work_options
from prehab_export.cli.groups import Decorator, chain, help_text
from prehab_export.cli.options import (
    BENCH,
    CALIBRATION,
    EXPORT,
    PREHAB,
    QUANTISATION,
    REFINEMENT,
    REHAB,
    TRUNCATION,
    flag_options,
    flags_through,
)
from prehab_export.cli.parsing import parse_request
from prehab_export.cli.target_verbs import bench_at_target, read_target_results, result_options, target_options
from prehab_export.config import RunConfig
from prehab_export.pipeline import DEPENDENCIES

STAGE_NOTE = """The command works on the folder of a run, given as MODEL or with -o, and uses the options saved there
unless the command line overrides them. It brings earlier stages up to date first. With a model and -o it starts a new
run and stops after this stage."""


@dataclass(frozen=True)
class StageVerb:
    """A verb that brings a run up to date through a stage.

    until: the last stage that the verb brings up to date.
    redo: the stages that --force repeats.
    titles: the titles of the verb's own options. The help shows them before the options of earlier stages.
    summary: the text in the list of verbs.
    text: the text of the verb's own help.
    examples: command lines for the help, without the program's name.
    options: a decorator that adds further options.
    run_before: work before the stages, given the command's parameters. It returns True if nothing is left to do.
    """

    name: str
    until: str
    redo: tuple[str, ...]
    titles: tuple[str, ...]
    summary: str
    text: str
    examples: tuple[str, ...]
    options: Decorator = lambda command: command
    run_before: Callable[[dict[str, Any]], bool] = lambda _parameters: False

    @property
    def is_run(self) -> bool:
        """Whether this is the verb ``run``, which runs all stages and starts from a model."""
        return self.name == "run"

    def __call__(self, **parameters: Any) -> None:
        if self.run_before(parameters):
            return
        config, output = parse_request(parameters, inherit=not self.is_run)
        until, redo = self.until, self.redo if parameters["force"] else ()
        if until == "baseline" and config.ort:
            # The stage ``ort`` needs a verified graph, so it comes some stages later.
            until, redo = "ort", (*redo, "ort") if parameters["force"] else ()
        if parameters["dry_run"]:
            show_forecast(config, output, until, redo, parameters["as_json"])
            return
        from prehab_export.pipeline import check_speed
        from prehab_export.pipeline import run as run_pipeline

        workspace = run_pipeline(config, output, until=until, redo=redo)
        show_result(workspace, self.name, parameters["as_json"])
        if config.min_speedup is not None and until in ("bench", "report"):
            check_speed(workspace, config.min_speedup)


def make_command(verb: StageVerb) -> Callable[..., None]:
    """Return the function that click turns into the verb's command, with its help text and its options."""

    def command(**parameters: Any) -> None:
        verb(**parameters)

    note = "" if verb.is_run else STAGE_NOTE
    command.__doc__ = help_text(f"{verb.text}\n\n{note}", *verb.examples)
    flags = flags_through(verb.until)
    verb_flags = [flag for title in verb.titles for flag in flags if flag.title == title]
    earlier_flags = [flag for flag in flags if flag.title not in verb.titles]
    options = (common_options, work_options, AS_JSON, flag_options(verb_flags), verb.options)
    return chain(click.argument("model", required=False), *options, flag_options(earlier_flags))(command)


def show_result(workspace: Any, verb: str, as_json: bool) -> None:
    """Print the result of a verb, as JSON or as text."""
    from prehab_export.cli.tables.summary import print_summary
    from prehab_export.pipeline import read_result

    if as_json:
        click.echo(json.dumps(read_result(workspace, verb), indent=2))
    else:
        print_summary(workspace, verb)


def show_forecast(config: RunConfig, output: Path, until: str, redo: tuple[str, ...], as_json: bool) -> None:
    """Print what a command would do, as JSON or as text."""
    from prehab_export.cli.tables.forecast import print_forecast
    from prehab_export.pipeline import forecast

    run_forecast = forecast(config, output, until=until, redo=redo)
    if as_json:
        click.echo(json.dumps(run_forecast.facts(), indent=2))
    else:
        print_forecast(run_forecast)


_STEPS = ", ".join(name for name in DEPENDENCIES if name not in ("merge", "times", "baseline", "artifact"))
RUN_VERB = StageVerb(
    "run",
    "report",
    ("verify", "artifact", "bench", "report"),  # the other stages would produce the same result again
    (),
    "Run all stages, from a model to an artifact and a report.",
    f"""Run all stages that the options ask for: {_STEPS}.

MODEL is a local folder or a hub id, or the folder of an earlier run to continue.""",
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
        """Gather second moments of each selected layer's input (C, with its mean) and of the gradient at its output
(G), on a small sample.""",
        ("calibrate my-bert -o out --task text-classification --data reviews.csv", "calibrate out --exclude '*.0.*'"),
    ),
    StageVerb(
        "prehab",
        "prehab",
        ("prehab",),
        (PREHAB, TRUNCATION),
        "Fine-tune the model so that truncation hurts it less.",
        """Fine-tune the model so that truncation hurts it less. The loss is the task loss plus λ times a smooth
surrogate of the rank. The result is kept only if it improves the truncated model.""",
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
        """Train the factors for a few steps, with labels. Each part of the training is kept only if it helps.""",
        ("rehab out --rehab-steps 100",),
    ),
    StageVerb(
        "export",
        "baseline",
        ("export", "baseline"),
        (EXPORT,),
        "Write the compressed folder and graph, and the dense baseline.",
        """Write the folder and ONNX graph of the compressed model, and the same for the dense baseline.""",
        ("export out --dtype bfloat16", "export out --ort"),
    ),
    StageVerb(
        "verify",
        "artifact",
        ("verify", "artifact"),
        (),
        "Check the written files in a fresh process and publish them.",
        """Reopen the written files in a fresh process, check them, and publish the artifact.""",
        ("verify out",),
    ),
    StageVerb(
        "quantize",
        "quantize",
        ("quantize",),
        (QUANTISATION,),
        "Write quantised graphs and measure their quality.",
        """Write int8, int4 or float16 graphs of the compressed and the dense model, and measure their
quality.""",
        ("quantize out --quantize int8 --quantize int4",),
    ),
    StageVerb(
        "bench",
        "bench",
        ("bench",),
        (BENCH,),
        "Measure latency and memory, compared with the dense model.",
        """Measure latency and memory, compared with the dense model, on this machine or at a target.""",
        (
            "bench out --threads 4 --bench-batch 1 --bench-batch 8",
            "bench out --min-speedup 1.2",
            "bench out --target ssh://user@board",
        ),
        target_options,
        bench_at_target,
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
        read_target_results,
    ),
)
