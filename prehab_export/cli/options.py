"""The flags of the command line that set an option of a run, as data.

A flag has a spelling, the key of the option that it sets, a title in the help, and the first stage whose result it
changes. Types, defaults and help texts come from the keys. An option without a flag is set by its key, with ``--set``
or in a YAML file.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_origin

import click

from converters.onnx.modes import KV_CACHES, MODES
from prehab_export.cli.groups import TitledOption, chain
from prehab_export.config import (
    ALLOCATIONS,
    DENSE_GRAPHS,
    DTYPES,
    OBJECTIVES,
    PRECISIONS,
    PROVIDERS,
    REHAB_METHODS,
    SURROGATES,
    WINDOW_STARTS,
    Key,
    known_keys,
)
from prehab_export.pipeline import DEPENDENCIES

MODEL = "Model"
DATA = "Data"
UNUSUAL_DATA = "Data in unusual formats"
COMPUTE = "Computing"
CALIBRATION = "Calibration"
TRUNCATION = "Truncation"
PREHAB = "Prehab: training before truncation"
REFINEMENT = "Refinement: tuning after truncation, without labels"
REHAB = "Rehab: training after truncation, with labels"
EXPORT = "Export"
QUANTISATION = "Quantisation"
BENCH = "Bench"


@dataclass(frozen=True)
class Flag:
    """A flag of the command line.

    spelling: the spelling in click's syntax, such as ``--ort/--no-ort``.
    path: the key that the flag sets.
    title: the title of its section in the help.
    stage: the first stage whose result the flag changes.
    values: the allowed values, if they are a fixed set.
    metavar: the placeholder for the value in the help.
    """

    spelling: str
    path: str
    title: str
    stage: str
    values: tuple[str, ...] = ()
    metavar: str | None = None

    @property
    def parameter(self) -> str:
        """The name of the command's parameter."""
        return self.path.replace(".", "__")

    @property
    def names(self) -> tuple[str, ...]:
        """The spellings without leading dashes, such as ``ort`` and ``no-ort``."""
        return tuple(name.lstrip("-") for name in self.spelling.split("/"))

    @property
    def key(self) -> Key:
        return known_keys()[self.path]

    @property
    def option(self) -> Any:
        """The decorator that adds the flag to a command.

        The default of the parameter is None, so that saved options and the YAML file apply if the flag is not given.
        The help shows the default of the key.
        """
        kind = _click_type(self.key.kind)
        many = get_origin(self.key.kind) is tuple
        extra: dict[str, Any] = {"is_flag": True} if kind is bool else {"multiple": many, "metavar": self.metavar}
        if kind is not bool:
            extra["type"] = click.Choice(self.values) if self.values else kind
        return click.option(
            self.spelling, self.parameter, cls=TitledOption, title=self.title, default=None, help=self._help, **extra
        )

    @property
    def _help(self) -> str:
        text = self.key.meaning.partition(". ")[0]
        if get_origin(self.key.kind) is tuple:
            text = f"{text}; repeat for more"
        return f"{capitalise(text)}.{self._default}"

    @property
    def _default(self) -> str:
        default = self.key.default
        if default in (None, ()) or isinstance(default, bool):
            return "" if not default else f"  [default: {self.spelling.split('/')[0]}]"
        return f"  [default: {' '.join(map(str, default)) if isinstance(default, tuple) else default}]"


def capitalise(text: str) -> str:
    """Capitalise the first letter of a text if it is an ASCII letter.

    >>> capitalise("samples per step"), capitalise("λ, the weight")
    ('Samples per step', 'λ, the weight')
    """
    return text[:1].upper() + text[1:] if text[:1].isascii() else text


def _click_type(annotation: Any) -> Any:
    """Return the type that click parses. A value that may be a number or a word stays text: the config parses it."""
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind not in (type(None), Ellipsis)]
    return kinds[0] if len(kinds) == 1 else str


FLAGS = (
    Flag("--task", "task", MODEL, "merge", metavar="TASK"),
    Flag("--adapter", "adapter", MODEL, "merge", metavar="FOLDER"),
    Flag("--revision", "revision", MODEL, "merge", metavar="REVISION"),
    Flag("--trust-remote-code/--no-trust-remote-code", "trust_remote_code", MODEL, "merge"),
    Flag("--data", "data.data", DATA, "merge", metavar="DATA"),
    Flag("--data-config", "data.data_config", DATA, "merge", metavar="NAME"),
    Flag("--train-split", "data.train_split", DATA, "merge", metavar="SPLIT"),
    Flag("--eval-split", "data.eval_split", DATA, "merge", metavar="SPLIT"),
    Flag("--input-column", "data.input_column", DATA, "merge", metavar="COLUMN"),
    Flag("--pair-column", "data.pair_column", DATA, "merge", metavar="COLUMN"),
    Flag("--label-column", "data.label_column", DATA, "merge", metavar="COLUMN"),
    Flag("--sequence-length", "data.sequence_length", DATA, "merge", metavar="TOKENS"),
    Flag("--eval-samples", "data.eval_samples", DATA, "merge", metavar="N"),
    Flag("--batch-size", "data.batch_size", DATA, "merge", metavar="N"),
    Flag("--labels-by-position/--labels-by-name", "data.labels_by_position", UNUSUAL_DATA, "merge"),
    Flag("--window-start", "data.window_start", UNUSUAL_DATA, "merge", WINDOW_STARTS),
    Flag("--encoding", "data.encoding", UNUSUAL_DATA, "merge", metavar="NAME"),
    Flag("--delimiter", "data.delimiter", UNUSUAL_DATA, "merge", metavar="CHARACTER"),
    Flag("--header/--no-header", "data.header", UNUSUAL_DATA, "merge"),
    Flag("--device", "device", COMPUTE, "merge", metavar="DEVICE"),
    Flag("--max-memory", "max_memory", COMPUTE, "merge", metavar="SIZE"),
    Flag("--precision", "precision", COMPUTE, "merge", PRECISIONS),
    Flag("--threads", "bench.threads", COMPUTE, "merge", metavar="N"),
    Flag("--seed", "seed", COMPUTE, "merge", metavar="N"),
    Flag("--calibration-samples", "calibrate.samples", CALIBRATION, "calibrate", metavar="N"),
    Flag("--include", "calibrate.include", CALIBRATION, "calibrate", metavar="PATTERN"),
    Flag("--exclude", "calibrate.exclude", CALIBRATION, "calibrate", metavar="PATTERN"),
    # Prehab trains for the ranks that truncation will choose.
    Flag("--ratio", "truncate.ratio", TRUNCATION, "prehab", metavar="SHARE"),
    Flag("--budget", "truncate.budget", TRUNCATION, "prehab", metavar="BUDGET"),
    Flag("--objective", "truncate.objective", TRUNCATION, "prehab", OBJECTIVES),
    Flag("--allocation", "truncate.allocation", TRUNCATION, "prehab", ALLOCATIONS),
    Flag("--rank-multiple", "truncate.rank_multiple", TRUNCATION, "prehab", metavar="N"),
    Flag("--share-inputs/--no-share-inputs", "truncate.share_inputs", TRUNCATION, "prehab"),
    Flag("--drift-correction/--no-drift-correction", "truncate.drift_correction", TRUNCATION, "prehab"),
    Flag("--prehab-steps", "prehab.train.steps", PREHAB, "prehab", metavar="N"),
    Flag("--prehab-lambda", "prehab.strength", PREHAB, "prehab", metavar="NUMBER"),
    Flag("--prehab-lr", "prehab.train.learning_rate", PREHAB, "prehab", metavar="RATE"),
    Flag("--prehab-batch-size", "prehab.train.batch_size", PREHAB, "prehab", metavar="N"),
    Flag("--surrogate", "prehab.surrogate", PREHAB, "prehab", SURROGATES),
    # Block-wise refinement and its batch size are part of truncation, for which prehab trains.
    Flag("--refine-block-steps", "refine.block_steps", REFINEMENT, "prehab", metavar="N"),
    Flag("--refine-batch-size", "refine.schedule.batch_size", REFINEMENT, "prehab", metavar="N"),
    Flag("--refine-steps", "refine.schedule.steps", REFINEMENT, "refine", metavar="N"),
    Flag("--refine-lr", "refine.schedule.learning_rate", REFINEMENT, "refine", metavar="RATE"),
    Flag("--rehab-steps", "rehab.train.steps", REHAB, "rehab", metavar="N"),
    Flag("--rehab-method", "rehab.method", REHAB, "rehab", REHAB_METHODS),
    Flag("--rehab-lr", "rehab.train.learning_rate", REHAB, "rehab", metavar="RATE"),
    Flag("--rehab-batch-size", "rehab.train.batch_size", REHAB, "rehab", metavar="N"),
    Flag("--lora-rank", "rehab.lora_rank", REHAB, "rehab", metavar="N"),
    Flag("--dtype", "dtype", EXPORT, "export", DTYPES),
    Flag("--kv-cache", "kv_cache", EXPORT, "export", KV_CACHES),
    Flag("--dense-graph", "dense_graph", EXPORT, "baseline", DENSE_GRAPHS),
    Flag("--ort/--no-ort", "ort", EXPORT, "export"),  # it makes the verb ``export`` run the stage ``ort``
    Flag("--quantize", "quantize", QUANTISATION, "prehab", MODES),  # a mode with blocks restricts the ranks
    Flag("--bench-threads", "bench.thread_counts", BENCH, "bench", metavar="N"),
    Flag("--bench-batch", "bench.batch_sizes", BENCH, "bench", metavar="N"),
    Flag("--bench-length", "bench.sequence_lengths", BENCH, "bench", metavar="TOKENS"),
    Flag("--new-tokens", "bench.new_tokens", BENCH, "bench", metavar="N"),
    Flag("--provider", "bench.provider", BENCH, "bench", tuple(PROVIDERS), metavar="PROVIDER"),
    Flag("--min-speedup", "min_speedup", BENCH, "bench", metavar="TIMES"),
)

# A fit chooses the excluded options itself, or does not use them.
_FIT_TITLES = {MODEL, DATA, UNUSUAL_DATA, COMPUTE, CALIBRATION, TRUNCATION, EXPORT, QUANTISATION, BENCH}
_FIT_EXCLUDED_PATHS = {"truncate.ratio", "truncate.budget", "truncate.objective", "truncate.allocation", "ort"}
_FIT_EXCLUDED_PATHS |= {"bench.threads", "bench.thread_counts", "bench.provider", "min_speedup"}
# A sweep chooses the excluded options itself.
_SWEEP_TITLES = {MODEL, DATA, UNUSUAL_DATA, COMPUTE, CALIBRATION, TRUNCATION, REFINEMENT}
_SWEEP_EXCLUDED_PATHS = {"truncate.ratio", "truncate.budget", "truncate.objective", "truncate.allocation"}
_SWEEP_EXCLUDED_PATHS |= {"truncate.drift_correction"}


@cache
def flag_paths() -> dict[str, str]:
    """Return the key that each flag sets, by the flag's names without leading dashes."""
    return {name: flag.path for flag in FLAGS for name in flag.names}


def flags_through(stage: str) -> list[Flag]:
    """Return the flags that change the result of this stage or of an earlier stage."""
    order = list(DEPENDENCIES)
    return [flag for flag in FLAGS if order.index(flag.stage) <= order.index(stage)]


def sweep_flags() -> list[Flag]:
    """Return the flags of the verb ``sweep``."""
    return [flag for flag in FLAGS if flag.title in _SWEEP_TITLES and flag.path not in _SWEEP_EXCLUDED_PATHS]


def fit_flags() -> list[Flag]:
    """Return the flags of the verb ``fit``."""
    return [flag for flag in FLAGS if flag.title in _FIT_TITLES and flag.path not in _FIT_EXCLUDED_PATHS]


def flag_options(flags: Iterable[Flag]) -> Any:
    """Return a decorator that adds the flags to a command."""
    return chain(*(flag.option for flag in flags))


def unknown_option_advice(option: str, verb: str) -> str | None:
    """Return advice on an option that a verb does not have, or None if the option is unknown.

    Args:
        option: the option as the user wrote it, such as ``--ratio``.
    """
    name = option.lstrip("-")
    flag = next((flag for flag in FLAGS if name in flag.names), None)
    if flag is not None:
        return f"{verb} does not depend on it; --set {flag.path}=VALUE saves it for the verbs that do"
    keys = {path.replace(".", "-").replace("_", "-"): path for path in known_keys()}
    if (path := keys.get(name.removeprefix("no-"))) is not None:
        return f"set it by its key: --set {path}=VALUE"
    return None
