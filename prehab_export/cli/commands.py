"""The verbs of the command line: parse, call one function, print. Nothing heavy is imported before it is needed."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from prehab_export.cli.common import AS_JSON, common_options
from prehab_export.cli.groups import Verbs, decorated, titled
from prehab_export.cli.options import advice_on, fit_flags, sweep_flags, with_flags
from prehab_export.cli.parsing import requested
from prehab_export.cli.stage_verbs import STAGE_VERBS, WHOLE, as_command, show_result
from prehab_export.pipeline import METHODS
from prehab_export.system import BudgetError

WHOLE_RUNS, STAGES, LOOKING, MORE = "Whole runs", "Stages of a run", "Looking", "Further"


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="prehab-export")
def cli() -> None:
    """Compress a trained transformer into a low-rank model that deploys.

    \b
    Exit codes: 0 done, 1 a defect, 2 bad input, 3 the exported model does not
    compute what it should, 4 slower than --min-speedup asks or no model within
    a fit's budget, 5 the place to measure at fails, 6 the disk is full or fails.
    """


cli.verb(WHOLE.name, WHOLE_RUNS, WHOLE.short, advice=advice_on)(as_command(WHOLE))


_budget = partial(titled, "Budget and device")
fit_options = decorated(
    _budget("--p95", metavar="TIME", help="Limit on a request's 95th percentile, such as 20ms."),
    _budget("--memory", metavar="SIZE", help="Limit on the peak memory of the process that serves it, such as 128MB."),
    _budget("--size", metavar="SIZE", help="Limit on the ONNX file, such as 20MB."),
    _budget(
        "--max-drop",
        metavar="DROP",
        help="Most that may be lost: points of accuracy (1% or 1pt), or a perplexity's rise in % (2%).",
    ),
    _budget(
        "--target",
        default="local",
        show_default=True,
        metavar="TARGET",
        help="Where to measure: local, ssh://user@host, adb, adb:SERIAL or browser.",
    ),
    _budget("--python", default="python3", show_default=True, metavar="COMMAND", help="Interpreter over there."),
    _budget(
        "--threads",
        "threads",
        type=int,
        multiple=True,
        default=(1,),
        show_default=True,
        metavar="N",
        help="Threads that the runtime may use; repeat to try more.",
    ),
)


@cli.verb("fit", WHOLE_RUNS, "The most accurate model within a budget, on the device itself.", advice=advice_on)
@decorated(click.argument("model", required=False), common_options, AS_JSON, fit_options, with_flags(fit_flags()))
def fit(target: str, python: str, threads: tuple[int, ...], as_json: bool, **given: Any) -> None:
    """Find the most accurate model within a budget on the device where it will run.

    Ranks, the kinds of quantisation given with --quantize and the numbers of threads are searched by measured times of
    the device; the two or three best are made and measured there. Exit code 4 if none is within the budget. A fit that
    was killed, or is asked again with another budget, computes only what is missing.

    \b
    Examples:
      prehab-export fit my-bert -o out --task text-classification --data reviews.csv --p95 20ms --quantize int8
      prehab-export fit out --target ssh://user@board --memory 128MB --max-drop 1%
    """
    from prehab_export.config import Budget, Target

    config, output = requested(given)
    metric = "perplexity" if config.task == "text-generation" else "accuracy"
    budget = Budget.parse(**{name: given[name] for name in ("p95", "memory", "size", "max_drop")}, metric=metric)
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


_compared = partial(titled, "What to compare")
sweep_options = decorated(
    _compared(
        "--ratio",
        "ratios",
        type=float,
        multiple=True,
        default=(0.2, 0.4, 0.6, 0.8),
        show_default=True,
        metavar="SHARE",
        help="Share of the selected layers' parameters to remove; repeat for more.",
    ),
    _compared(
        "--method",
        "methods",
        type=click.Choice(list(METHODS)),
        multiple=True,
        default=("svd", "svd-llm", "fisher", "drift"),
        show_default=True,
        help="Way of truncation; refined needs --refine-steps. Repeat for more.",
    ),
)


@cli.verb("sweep", WHOLE_RUNS, "Several methods at several ratios, from one calibration.", advice=advice_on)
@decorated(click.argument("model", required=False), common_options, AS_JSON, sweep_options, with_flags(sweep_flags()))
def sweep(ratios: tuple[float, ...], methods: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Compare methods over ratios: one calibration, one decomposition a layer, a table and a plot.

    A sweep that was killed, or is asked for more, computes only what is missing.

    \b
    Examples:
      prehab-export sweep my-bert -o out --task text-classification --data reviews.csv
      prehab-export sweep out --ratio 0.7 --ratio 0.9 --method drift
    """
    config, output = requested(given)
    from prehab_export.cli.tables.sweep import print_sweep
    from prehab_export.pipeline import sweep as run_sweep

    folder = run_sweep(config, output, methods, ratios)
    result = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        print_sweep(result["dense"], result["rows"])
        click.echo(f"table and plot  {folder}")


@cli.verb("demo", WHOLE_RUNS, "A small ViT on scikit-learn's digits, all the way.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("demo-run"), show_default=True)
@click.option("--threads", type=int, default=None, help="Threads of PyTorch and ONNX Runtime.")
@AS_JSON
def demo(output: Path, threads: int | None, as_json: bool) -> None:
    """Train a small ViT on scikit-learn's digits and take it all the way. No network, about two minutes."""
    from prehab_export.pipeline import run_demo

    show_result(run_demo(output, threads), "demo", as_json)


for _verb in STAGE_VERBS:
    cli.verb(_verb.name, STAGES, _verb.short, advice=advice_on)(as_command(_verb))


@cli.verb("status", LOOKING, "What a run's folder holds, what is out of date, and why.")
@click.argument("output", metavar="OUT", type=click.Path(exists=True, file_okay=False, path_type=Path))
@AS_JSON
def status(output: Path, as_json: bool) -> None:
    """Tell what a run's folder holds, what of it no longer answers to the run's options, and why.

    OUT is the folder of a run. Nothing is computed or changed. What other options would do is told by --dry-run:
    prehab-export run OUT --ratio 0.8 --dry-run
    """
    from prehab_export.cli.tables.status import print_status
    from prehab_export.pipeline import status as status_of

    found = status_of(output)
    if as_json:
        click.echo(json.dumps(found.facts(), indent=2))
    else:
        print_status(found)


@cli.verb("inspect", LOOKING, "A model's layers, spectra, and what would be compressed.")
@click.argument("path", metavar="MODEL-OR-ARTIFACT")
@click.option("--include", multiple=True, metavar="PATTERN", help="Layers to compress instead of the default.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Layers to leave dense.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@AS_JSON
def inspect(path: str, as_json: bool, **given: Any) -> None:
    """Show layers, shapes, shared inputs, spectra, ranks, and what would be compressed."""
    from prehab_export.cli.tables.inspection import print_inspection
    from prehab_export.pipeline import inspect_model

    result = inspect_model(path, **given)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        print_inspection(result)


@cli.verb("options", LOOKING, "Every option by name: default, flag and meaning.")
@click.argument("words", nargs=-1, metavar="[WORD]...")
@AS_JSON
def options(words: tuple[str, ...], as_json: bool) -> None:
    """List every option by its name in the YAML file: default, flag and meaning; with words, those that have all.

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


@cli.verb("merge-lora", MORE, "A LoRA adapter into the factors of an artifact.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the merged artifact.")
@click.option(
    "--statistics",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Calibration statistics; found by itself when ARTIFACT lies in its run's folder.",
)
@click.option("--threads", type=int, default=None, metavar="N", help="Threads of ONNX Runtime.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@AS_JSON
def merge_lora(artifact: Path, adapter: Path, as_json: bool, **given: Any) -> None:
    """Merge a PEFT LoRA adapter into the factors of an artifact, at the same ranks."""
    from prehab_export.cli.tables.merge import print_merge
    from prehab_export.pipeline import merge_lora as merge

    result = merge(artifact, adapter, **given)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        print_merge(result)


@cli.verb("clean", MORE, "Remove results that no current option of a run needs.")
@click.argument("output", metavar="OUT", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@AS_JSON
def clean(output: Path, dry_run: bool, as_json: bool) -> None:
    """Remove what no current option of a run needs: results of earlier options, and what fits and sweeps keep.

    OUT is the folder of a run. Its artifact, baseline, report, and the tables of fits and sweeps stay.
    """
    from prehab_export.cli.tables.cleaning import print_cleaning
    from prehab_export.pipeline import clean_run

    removed = clean_run(output, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps([vars(leftover) for leftover in removed], indent=2))
    else:
        print_cleaning(removed, dry_run)
