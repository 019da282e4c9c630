"""The command line: parse, call one function, print. Nothing heavy is imported before it is needed."""

import difflib
import functools
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from converters.errors import InputError
from converters.onnx.modes import KV_CACHES, MODES
from prehab_export.config import (
    ALLOCATIONS,
    DTYPES,
    FISHER_LABELS,
    LAYER_WEIGHTS,
    OBJECTIVES,
    PRECISIONS,
    PROVIDERS,
    REHAB_METHODS,
    SCHEDULES,
    SURROGATES,
    TASK_NAMES,
    UPDATES,
    WHITENINGS,
    WINDOW_STARTS,
    RunConfig,
    from_dict,
    with_absolute_paths,
)
from prehab_export.pipeline import METHODS
from prehab_export.system import BudgetError, ParityError, StorageError, TargetError, is_full, out_of_space

# Verb → the last stage that it brings up to date, and what it prints with --json.
VERBS = {
    "calibrate": ("calibrate", "Gather second moments of every targeted layer."),
    "prehab": ("prehab", "Fine-tune towards weights that truncation hurts less."),
    "truncate": ("truncate", "Choose ranks and cut every targeted layer into two factors."),
    "refine": ("refine", "Tune the factors towards the dense model's output, without labels."),
    "rehab": ("rehab", "Train the factors for a few steps."),
    "export": ("baseline", "Write the compressed folder and ONNX graph, and the dense twin."),
    "verify": ("artifact", "Reopen what was written in a fresh process, check it, and publish it."),
    "quantize": ("quantize", "Write int8, int4 or float16 graphs, compressed and dense, and measure what they cost."),
    "bench": ("bench", "Measure latency and memory against the dense model."),
    "report": ("report", "Write report.json, report.md and the plots."),
}

# Last stage → what --force does again; of ``run``, all that is measured rather than computed.
REDO = {
    "baseline": ("export", "baseline"),
    "artifact": ("verify", "artifact"),
    "report": ("verify", "artifact", "bench", "report"),
} | {stage: (stage,) for stage in ("calibrate", "prehab", "truncate", "refine", "rehab", "quantize", "ort", "bench")}

# Flag without its dashes → place of the field that it sets, for --unset.
FIELD_OF: dict[str, str] = {}

Command = Callable[..., Any]
Option = tuple[str, Callable[[Command], Command]]


def option(flag: str, path: str, help: str, **extra: Any) -> Option:
    """A flag that sets one field of the config, ``path`` being its place (``truncate.ratio``).

    The default shown is the config's own; a flag that is not given stays unset, so that saved options and the YAML
    file keep their say.
    """
    FIELD_OF.update({name.lstrip("-"): path for name in flag.split("/")})
    kind, default = _field(path)
    if kind in (int, float):
        extra.setdefault("type", kind)
    if default not in (None, (), MISSING):
        help = f"{help}  [default: {' '.join(map(str, default)) if isinstance(default, tuple) else default}]"
    return flag, click.option(flag, path.replace(".", "__"), default=None, help=help, **extra)


def plain(flag: str, *names: str, **extra: Any) -> Option:
    """A flag that is no field of the config."""
    return flag, click.option(flag, *names, **extra)


def _field(path: str) -> tuple[Any, Any]:
    """Type and default of a config field."""
    cls: Any = RunConfig
    made: Any = None
    for part in path.split("."):
        kind = get_type_hints(cls)[part]
        entry = next(item for item in fields(cls) if item.name == part)
        if made is not None:
            made = getattr(made, part)
        elif entry.default_factory is not MISSING:
            made = entry.default_factory()
        else:
            made = None if entry.default is MISSING else entry.default
        cls = kind
    kinds = [kind for kind in get_args(cls) or (cls,) if kind is not type(None)]
    return kinds[0], made


def _choice(values: tuple[str, ...]) -> click.Choice:
    return click.Choice(values)


RUN_OPTIONS: list[Option] = [
    plain("--output", "-o", type=click.Path(path_type=Path), help="The run's folder."),
    plain(
        "--config",
        "config_file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Options as YAML, in the shape of a saved run.yaml. Flags win over it.",
    ),
    option("--task", "task", "What the model does.", type=_choice(TASK_NAMES)),
    option("--data", "data.data", "Hub id, folder or file; sklearn-digits is built in."),
    option("--data-config", "data.data_config", "Configuration of a hub data set (e.g. sst2 of glue)."),
    option("--train-split", "data.train_split", "Split to calibrate and train on; found when not given."),
    option("--eval-split", "data.eval_split", "Split to report on, e.g. validation+test; found when not given."),
    option("--input-column", "data.input_column", "Column of images or texts; found when not given."),
    option("--pair-column", "data.pair_column", "Second text column of a pair task; found when not given."),
    option("--label-column", "data.label_column", "Column of labels; found when not given."),
    option("--encoding", "data.encoding", "Of text, csv and JSON files, e.g. cp1252; UTF-8 when not given.", type=str),
    option("--delimiter", "data.delimiter", "What separates the columns of a csv file: a character, or tab.", type=str),
    option(
        "--header/--no-header", "data.header", "Whether the first row of a csv file names its columns.", is_flag=True
    ),
    option(
        "--labels-by-position/--labels-by-name",
        "data.labels_by_position",
        "Take the data's class names in the model's order, whatever they are.",
        is_flag=True,
    ),
    option("--sequence-length", "data.sequence_length", "Window of a language model; longest text of a classifier."),
    option(
        "--window-start",
        "data.window_start",
        "What windows of text start with: as the tokenizer does it, its BOS token, or none.",
        type=_choice(WINDOW_STARTS),
    ),
    option("--eval-samples", "data.eval_samples", "Report on so many samples only."),
    option("--batch-size", "data.batch_size", "Samples a batch, in calibration and evaluation."),
    option("--adapter", "adapter", "PEFT adapter of the dense model (LoRA, DoRA, IA3 …), merged before anything else."),
    option("--revision", "revision", "Branch, tag or commit of a hub model."),
    option(
        "--trust-remote-code/--no-trust-remote-code",
        "trust_remote_code",
        "Run code that comes with the model.",
        is_flag=True,
    ),
    option("--seed", "seed", "Seed of everything drawn at random."),
    option("--device", "device", "Where to calibrate and train: auto, cpu, cuda or cuda:N."),
    option("--precision", "precision", "Number format of forward passes.", type=_choice(PRECISIONS)),
    option("--dtype", "dtype", "Number format of the artifact's weights.", type=_choice(DTYPES)),
    option("--include", "calibrate.include", "Pattern of layers to compress instead of the default.", multiple=True),
    option("--exclude", "calibrate.exclude", "Pattern of layers to leave dense.", multiple=True),
    option("--calibration-samples", "calibrate.samples", "Samples to gather moments from."),
    option(
        "--fisher-labels",
        "calibrate.labels",
        "Labels behind the gradients: given ones, or drawn from the model.",
        type=_choice(FISHER_LABELS),
    ),
    option("--ratio", "truncate.ratio", "Share of the targeted layers' parameters to remove."),
    option("--budget", "truncate.budget", "parameters, by --ratio; or latency:SHARE of the dense layers' time."),
    option("--objective", "truncate.objective", "What truncation minimises.", type=_choice(OBJECTIVES)),
    option("--allocation", "truncate.allocation", "How ranks are shared out.", type=_choice(ALLOCATIONS)),
    option("--rank-multiple", "truncate.rank_multiple", "Ranks come in multiples of this, if the ratio allows it."),
    option("--rank-floor", "truncate.floor_share", "Least share of its uniform rank that a layer gets."),
    option(
        "--share-inputs/--no-share-inputs",
        "truncate.share_inputs",
        "Let layers with one input have one down between them, where that loses less.",
        is_flag=True,
    ),
    option(
        "--drift-correction/--no-drift-correction",
        "truncate.drift_correction",
        "Fit each layer to what the compressed layers before it give.",
        is_flag=True,
    ),
    option("--refine-steps", "refine.schedule.steps", "Steps of label-free tuning towards the dense model's output."),
    option("--refine-lr", "refine.schedule.learning_rate", "Peak learning rate of refinement."),
    option("--refine-batch-size", "refine.schedule.batch_size", "Samples a step of refinement."),
    option("--refine-hidden", "refine.hidden_share", "Share of refinement's loss that follows hidden states."),
    option("--refine-block-steps", "refine.block_steps", "Steps of refinement of each block by itself, before that."),
    option("--prehab-steps", "prehab.train.steps", "Steps of prehab; 0 skips it."),
    option("--prehab-lambda", "prehab.strength", "Weight of the surrogate, or auto: found by short trials.", type=str),
    option("--prehab-lambda-trials", "prehab.trials", "Trials that --prehab-lambda auto may spend."),
    option("--surrogate", "prehab.surrogate", "Smooth stand-in for rank.", type=_choice(SURROGATES)),
    option("--prehab-schedule", "prehab.schedule", "Course of λ.", type=_choice(SCHEDULES)),
    option("--prehab-whitening", "prehab.whitening", "Metric of the surrogate.", type=_choice(WHITENINGS)),
    option(
        "--prehab-update",
        "prehab.update",
        "Add the surrogate's gradient to the task's, or shrink the weight directly.",
        type=_choice(UPDATES),
    ),
    option("--prehab-every", "prehab.every", "Each layer's surrogate is evaluated once in so many steps."),
    option(
        "--prehab-layer-weights",
        "prehab.layer_weights",
        "What a layer's own λ is in proportion to.",
        type=_choice(LAYER_WEIGHTS),
    ),
    option("--prehab-refresh", "prehab.refresh_every", "Steps between fresh moments."),
    option("--prehab-lr", "prehab.train.learning_rate", "Peak learning rate of prehab."),
    option("--prehab-batch-size", "prehab.train.batch_size", "Samples a step of prehab."),
    option("--prehab-distill", "prehab.train.distill", "Share of the loss that follows the dense model's output."),
    option("--prehab-guard/--no-prehab-guard", "prehab.guard", "Keep prehab only if truncation gains.", is_flag=True),
    option("--rehab-steps", "rehab.train.steps", "Steps of rehab; 0 skips it."),
    option(
        "--rehab-method",
        "rehab.method",
        "Tune the factors, all weights, or LoRA on the factors.",
        type=_choice(REHAB_METHODS),
    ),
    option("--rehab-lr", "rehab.train.learning_rate", "Peak learning rate of rehab."),
    option("--rehab-batch-size", "rehab.train.batch_size", "Samples a step of rehab."),
    option("--rehab-distill", "rehab.train.distill", "Share of the loss that follows the dense model's output."),
    option("--lora-rank", "rehab.lora_rank", "Rank of the adapters of --rehab-method lora."),
    option("--quantize", "quantize", "Another graph, smaller; repeat for more.", multiple=True, type=_choice(MODES)),
    option("--kv-cache", "kv_cache", "What a compressed decoder keeps of past tokens.", type=_choice(KV_CACHES)),
    option("--ort/--no-ort", "ort", "Also write .ort files, and what a minimal build must keep.", is_flag=True),
    option(
        "--quantize-refit/--no-quantize-refit",
        "quantize_refit",
        "Fit the factors to each quantised graph's grid; kept where held-out samples gain.",
        is_flag=True,
    ),
    option("--threads", "bench.threads", "Threads of PyTorch and ONNX Runtime."),
    option("--bench-threads", "bench.thread_counts", "Measure at so many threads; repeat.", multiple=True, type=int),
    option("--provider", "bench.provider", "Execution provider to measure on.", type=_choice(tuple(PROVIDERS))),
    option("--bench-batch", "bench.batch_sizes", "Batch size to measure; repeat for more.", multiple=True, type=int),
    option("--bench-length", "bench.sequence_lengths", "Length to measure; repeat for more.", multiple=True, type=int),
    option("--bench-rounds", "bench.rounds", "Turns of each model."),
    option("--min-speedup", "min_speedup", "Exit code 4 if a compressed graph is not this many times as fast."),
    option("--new-tokens", "bench.new_tokens", "Tokens that a decoder generates in a measurement."),
    plain(
        "--unset",
        multiple=True,
        metavar="OPTION",
        help="Take a saved option back to its default (--unset quantize); repeat for more.",
    ),
    plain("--force", is_flag=True, help="Do this verb's work again although it is up to date."),
    plain("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
]


# What a verb takes beyond the options of a run.
FURTHER_OPTIONS: dict[str, list[Option]] = {
    "bench": [
        plain("--target", help="local, kit:FOLDER, ssh://user@host, adb, adb:SERIAL or browser."),
        plain("--browser", help="The browser's command (browser); found when not given."),
        plain("--ort-web", "ort_web", type=click.Path(path_type=Path), help="onnxruntime-web's dist folder (browser)."),
        plain("--by-hand", is_flag=True, help="Serve the page to any browser, until Ctrl-C (browser)."),
        plain("--host", default="127.0.0.1", show_default=True, help="Address to serve at with --by-hand."),
        plain("--port", type=int, default=0, help="Port to serve at with --by-hand; a free one by default."),
        plain("--python", default="python3", show_default=True, help="The interpreter on another machine."),
        plain("--keep", is_flag=True, help="Leave the kit on the other machine, to copy less the next time."),
        plain("--cooldown", type=float, default=0.0, help="Seconds of rest before each turn."),
        plain("--pin-cores", type=int, help="Run on so many cores only (local)."),
        plain("--memory-limit", type=float, help="Megabytes to run in (local)."),
        plain("--matrix", type=float, multiple=True, help="Megabytes of a table threads × memory (local); repeat."),
    ],
    "report": [
        plain(
            "--target-results",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            multiple=True,
            help="results.json of a kit that was run by hand; repeat for more.",
        ),
    ],
}


def run_options(command: Command) -> Command:
    for _flag, decorate in reversed(RUN_OPTIONS):
        command = decorate(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="prehab-export")
def cli() -> None:
    """Compress a trained transformer into a low-rank model that deploys.

    Exit codes: 0 done, 1 a defect, 2 bad input, 3 the exported model does not compute what it should, 4 slower than
    --min-speedup asks or no model within a fit's budget, 5 the place to measure at fails, 6 the disk is full or fails.
    """


@cli.command()
@click.argument("model")
@run_options
def run(model: str, **flags: Any) -> None:
    """All stages: calibrate, prehab, truncate, rehab, export, verify, bench, report.

    MODEL is a local folder or a hub id, or the folder of an earlier run to go on with.
    """
    _run("run", model, flags, until="report", inherit=False)


def _stage_command(verb: str, until: str, text: str) -> None:
    def command(model: str | None, **flags: Any) -> None:
        if verb == "bench" and _benched_elsewhere(model, flags):
            return
        if verb == "report":
            _take_in(model, flags)
        _run(verb, model, flags, until=until, inherit=True)

    command.__doc__ = f"""{text}

    Works on the folder of a run, given as MODEL or with -o, with the options saved there unless others are
    given; earlier stages are brought up to date first. With a model and -o it starts a new run and stops here.
    """
    decorated = run_options(command)
    for _flag, decorate in reversed(FURTHER_OPTIONS.get(verb, [])):
        decorated = decorate(decorated)
    cli.command(name=verb)(click.argument("model", required=False)(decorated))


# Flag of bench → field of ``targets.measuring.Target``.
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


def _benched_elsewhere(model: str | None, flags: dict[str, Any]) -> bool:
    """Measure at the target that was asked for; False where none was."""
    own = {field: flags.pop(flag) for flag, field in TARGET_FIELDS.items()}
    if own["name"] is None:
        defaults = (None, False, (), 0, "python3", "127.0.0.1")
        if given := [flag for flag, field in TARGET_FIELDS.items() if own[field] not in defaults]:
            raise InputError(f"--{given[0].replace('_', '-')} needs --target")
        return False
    from prehab_export.config import Target
    from prehab_export.pipeline import bench_on_target

    target = Target(**own)
    del flags["force"]
    as_json = flags.pop("as_json")
    config, output = _parsed(model, flags, inherit=True)
    place = bench_on_target(config, output, target)
    if place.is_dir():
        if as_json:
            click.echo(json.dumps({"kit": str(place)}, indent=2))
        else:
            click.echo(f"kit  {place}\nrun it there with  python run_kit.py")
        return True
    from prehab_export.cli.tables.target import print_results

    results = json.loads(place.read_text(encoding="utf-8"))
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        print_results(results)
        click.echo(f"results  {place}")
    return True


def _take_in(model: str | None, flags: dict[str, Any]) -> None:
    """Read back what kits have measured elsewhere."""
    if results := flags.pop("target_results"):
        from prehab_export.pipeline import read_back

        own = {key: value for key, value in flags.items() if key not in ("force", "as_json")}
        config, output = _parsed(model, own, inherit=True)
        read_back(config, output, results)


for _verb, (_until, _text) in VERBS.items():
    _stage_command(_verb, _until, _text)


def _run(verb: str, model: str | None, flags: dict[str, Any], until: str, inherit: bool) -> None:
    force, as_json = flags.pop("force"), flags.pop("as_json")
    config, output = _parsed(model, flags, inherit)
    redo = REDO[until] if force else ()
    if until == "baseline" and config.ort:
        until = "ort"  # an .ort file is made of a graph that has been verified
        redo = (*redo, *(REDO[until] if force else ()))
    from prehab_export.pipeline import run as run_pipeline

    workspace = run_pipeline(config, output, until=until, redo=redo)
    _show_result(workspace, verb, as_json)
    if config.min_speedup is not None and until in ("bench", "report"):
        from prehab_export.pipeline import check_speed

        check_speed(workspace, config.min_speedup)


def _parsed(model: str | None, flags: dict[str, Any], inherit: bool) -> tuple[RunConfig, Path]:
    """The options and the folder that a command line means: saved options, then the YAML file, less what is unset,
    then the flags."""
    from prehab_export.pipeline import OPTIONS_FILE

    output, config_file, unset = flags.pop("output"), flags.pop("config_file"), flags.pop("unset")
    if model is not None and (Path(model) / OPTIONS_FILE).is_file():
        if output is not None and output.resolve() != Path(model).resolve():
            raise InputError(f"{model} is the folder of a run; give a model, or leave out -o")
        output, model, inherit = Path(model), None, True
    if output is None:
        raise InputError("give the run's folder with -o OUT")
    values: dict[str, Any] = {}
    if inherit and (output / OPTIONS_FILE).is_file():
        values = _read_yaml(output / OPTIONS_FILE)
    if config_file is not None:
        values = _merged(values, _read_yaml(config_file))
    for name in unset:
        values = _without(values, name)
    if model is not None:
        values["model"] = model
    for path, value in flags.items():
        if value is not None and value != ():
            values = _merged(
                values, functools.reduce(lambda inner, key: {key: inner}, reversed(path.split("__")), value)
            )
    return _config(values), output


def _config(values: dict[str, Any]) -> RunConfig:
    for key, flag in (("model", "MODEL"), ("task", "--task"), ("data", "--data")):
        if key not in values:
            raise InputError(f"{flag} is not given, neither on the command line nor in a saved run")
    config = from_dict(RunConfig, values)
    return with_absolute_paths(config)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no options; its shape is that of a saved run.yaml")
    return values


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The options without the one that a flag of this name sets.

    Raises:
        InputError: there is no such flag.
    """
    if (path := FIELD_OF.get(name.lstrip("-"))) is None:
        near = difflib.get_close_matches(name.lstrip("-"), FIELD_OF, n=1)
        advice = f"; did you mean {near[0]}?" if near else ", as in --unset quantize"
        raise InputError(f"--unset {name}: that is no option with a saved value{advice}")
    *sections, field = path.split(".")
    result = inner = dict(values)
    for section in sections:
        if not isinstance(inner.get(section), dict):  # nothing saved there, or no section: that is told when it is read
            return result
        inner[section] = inner = dict(inner[section])
    inner.pop(field, None)
    return result


def _show_result(workspace: Any, verb: str, as_json: bool) -> None:
    from prehab_export.cli.tables.summary import print_summary
    from prehab_export.pipeline import result_of

    if as_json:
        click.echo(json.dumps(result_of(workspace, verb), indent=2))
    else:
        print_summary(workspace, verb)


@cli.command()
@click.argument("output", metavar="OUT", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
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


@cli.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("demo-run"), show_default=True)
@click.option("--threads", type=int, default=None, help="Threads of PyTorch and ONNX Runtime.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def demo(output: Path, threads: int | None, as_json: bool) -> None:
    """Train a small ViT on scikit-learn's digits and take it all the way. No network, about two minutes."""
    from prehab_export.pipeline import run_demo

    _show_result(run_demo(output, threads), "demo", as_json)


def _sweep_options(command: Command) -> Command:
    """Those of a run, but for the ones that a sweep goes through itself."""
    own = {"--ratio", "--budget", "--objective", "--allocation", "--drift-correction/--no-drift-correction", "--force"}
    for flag, decorate in reversed(RUN_OPTIONS):
        if flag not in own:
            command = decorate(command)
    return command


@cli.command()
@click.argument("model", required=False)
@click.option("--ratio", "ratios", type=float, multiple=True, default=(0.2, 0.4, 0.6, 0.8), show_default=True,
              help="Share of the targeted layers' parameters to remove; repeat for more.")  # fmt: skip
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True,
              default=("svd", "svd-llm", "fisher", "drift"), show_default=True, help="Repeat for more.")  # fmt: skip
@_sweep_options
def sweep(model: str | None, ratios: tuple[float, ...], methods: tuple[str, ...], **flags: Any) -> None:
    """Compare methods over ratios: one calibration, one decomposition a layer, a table and a plot.

    A sweep that was killed, or is asked for more, computes only what is missing.
    """
    as_json = flags.pop("as_json")
    config, output = _parsed(model, flags, inherit=True)
    from prehab_export.cli.tables.sweep import print_sweep
    from prehab_export.pipeline import sweep as run_sweep

    folder = run_sweep(config, output, methods, ratios)
    result = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        print_sweep(result["dense"], result["rows"])
        click.echo(f"table and plot  {folder}")


def _fit_options(command: Command) -> Command:
    """Those of a run up to calibration and truncation; the fit finds the rest by itself."""
    own = {"--ratio", "--budget", "--objective", "--allocation", "--threads", "--min-speedup", "--force"}
    own |= {"--bench-threads", "--provider", "--ort/--no-ort", "--quantize-refit/--no-quantize-refit"}
    for flag, decorate in reversed(RUN_OPTIONS):
        if flag not in own and not flag.startswith(("--prehab", "--surrogate", "--refine", "--rehab", "--lora")):
            command = decorate(command)
    return command


@cli.command()
@click.argument("model", required=False)
@click.option("--target", default="local", show_default=True,
              help="Where to measure: local, ssh://user@host, adb, adb:SERIAL or browser.")  # fmt: skip
@click.option("--python", default="python3", show_default=True, help="The interpreter on another machine.")
@click.option("--p95", help="Limit on a request's 95th percentile, such as 20ms.")
@click.option("--memory", help="Limit on the peak memory of the process that serves the model, such as 128MB.")
@click.option("--size", help="Limit on the ONNX file, such as 20MB.")
@click.option("--max-drop", help="Most that may be lost: points of accuracy (1% or 1pt), or a perplexity's rise in %.")
@click.option("--threads", "threads", type=int, multiple=True, default=(1,), show_default=True,
              help="Threads that the runtime may use; repeat to try more.")  # fmt: skip
@_fit_options
def fit(model: str | None, target: str, python: str, threads: tuple[int, ...], **flags: Any) -> None:
    """Find the most accurate model within a budget on the device where it will run.

    Ranks, the kinds of quantisation given with --quantize and the numbers of threads are searched by measured times of
    the device; the two or three best are made and measured there. Exit code 4 if none is within the budget. A fit that
    was killed, or is asked again with another budget, computes only what is missing.
    """
    from prehab_export.config import Budget

    as_json = flags.pop("as_json")
    limits = {name: flags.pop(name) for name in ("p95", "memory", "size", "max_drop")}
    config, output = _parsed(model, flags, inherit=True)
    metric = "perplexity" if config.task == "text-generation" else "accuracy"
    budget = Budget.parsed(**limits, metric=metric)
    from prehab_export.config import Target
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


@cli.command()
@click.argument("path", metavar="MODEL-OR-ARTIFACT")
@click.option("--include", multiple=True, help="Pattern of layers to compress instead of the default.")
@click.option("--exclude", multiple=True, help="Pattern of layers to leave dense.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def inspect(path: str, as_json: bool, **flags: Any) -> None:
    """Show layers, shapes, shared inputs, spectra, ranks, and what would be compressed."""
    from prehab_export.cli.tables.inspection import print_inspection
    from prehab_export.pipeline import inspect_model

    result = inspect_model(path, **flags)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        print_inspection(result)


@cli.command("merge-lora")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the merged artifact.")
@click.option(
    "--statistics",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Calibration statistics; found by itself when ARTIFACT lies in its run's folder.",
)
@click.option("--threads", type=int, default=None, help="Threads of ONNX Runtime.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def merge_lora(artifact: Path, adapter: Path, as_json: bool, **flags: Any) -> None:
    """Merge a PEFT LoRA adapter into the factors of an artifact, at the same ranks."""
    from prehab_export.cli.tables.merge import print_merge
    from prehab_export.pipeline import merge_lora as merge

    result = merge(artifact, adapter, **flags)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        print_merge(result)


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _tidy_ends() -> Iterator[None]:
    """A polite kill, or a terminal that is closed, unwinds as an error does: what was started is ended, what is half
    written is taken away. Whoever has these signals ignored, as nohup does, keeps that."""
    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    numbers = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors that a user can mend become one sentence and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that the terminal lacks is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        with _tidy_ends():
            code = cli.main(args=arguments, prog_name="prehab-export", standalone_mode=False)
    except InputError as error:  # what cannot be read for want of room is no fault of the input
        click.echo(
            f"error: {error}{'; free some space, then the same command goes on' if is_full(error) else ''}", err=True
        )
        code = StorageError.exit_code if is_full(error) else error.exit_code
    except (ParityError, BudgetError, TargetError, StorageError) as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except FloatingPointError as error:  # a loss that overflowed, with what to change
        click.echo(f"error: {error}", err=True)
        code = InputError.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command again to go on", err=True)
        code = 130
    except Exception as error:
        if (reason := out_of_space(error)) is None:
            raise
        click.echo(f"error: {reason}; free some space, then the same command goes on", err=True)
        code = StorageError.exit_code
    sys.exit(code or 0)
