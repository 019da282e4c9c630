"""Every option of the command line that sets a key of the options, as data: how it is spelled, which key it sets, under
which title it stands, and the stage from which on it changes what is made. Types, defaults and help texts are the keys'
own. What is no flag here is set by its key alone: with ``--set``, or in a YAML file."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_origin

import click

from converters.onnx.modes import KV_CACHES, MODES
from prehab_export.cli.groups import TitledOption, decorated
from prehab_export.config import (
    ALLOCATIONS,
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
UNUSUAL_DATA = "Data that are not as usual"
COMPUTE = "Computing"
CALIBRATION = "Calibration"
TRUNCATION = "Truncation"
PREHAB = "Prehab: training before truncation"
REFINEMENT = "Refinement: tuning after truncation, without labels"
REHAB = "Rehab: training after that, with labels"
EXPORT = "Export"
QUANTISATION = "Quantisation"
BENCH = "Bench"


@dataclass(frozen=True)
class Flag:
    """One flag.

    spelling: as click has it, ``--ort/--no-ort``. path: the key that it sets. stage: from which on it matters.
    values: what it may be, where these are few. metavar: what stands for its value in the help.
    """

    spelling: str
    path: str
    title: str
    stage: str
    values: tuple[str, ...] = ()
    metavar: str | None = None

    @property
    def parameter(self) -> str:
        """Its name among the parameters of a command."""
        return self.path.replace(".", "__")

    @property
    def names(self) -> tuple[str, ...]:
        """``ort`` and ``no-ort``: its spellings without dashes in front."""
        return tuple(name.lstrip("-") for name in self.spelling.split("/"))

    @property
    def key(self) -> Key:
        return known_keys()[self.path]

    @property
    def option(self) -> Any:
        """The decorator that gives it to a command.

        Not given, it stays unset, so that saved options and the YAML file keep their say; the default in its help is
        the key's.
        """
        kind = _kind(self.key.kind)
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
        return f"{capitalised(text)}.{self._default}"

    @property
    def _default(self) -> str:
        default = self.key.default
        if default in (None, ()) or isinstance(default, bool):
            return "" if not default else f"  [default: {self.spelling.split('/')[0]}]"
        return f"  [default: {' '.join(map(str, default)) if isinstance(default, tuple) else default}]"


def capitalised(text: str) -> str:
    """With a capital in front, unless it begins with a sign of its own.

    >>> capitalised("samples per step"), capitalised("λ, the weight")
    ('Samples per step', 'λ, the weight')
    """
    return text[:1].upper() + text[1:] if text[:1].isascii() else text


def _kind(annotation: Any) -> Any:
    """What click is to read. A number or a word is read as text here, and told apart with the other options."""
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
    Flag("--precision", "precision", COMPUTE, "merge", PRECISIONS),
    Flag("--threads", "bench.threads", COMPUTE, "merge", metavar="N"),
    Flag("--seed", "seed", COMPUTE, "merge", metavar="N"),
    Flag("--calibration-samples", "calibrate.samples", CALIBRATION, "calibrate", metavar="N"),
    Flag("--include", "calibrate.include", CALIBRATION, "calibrate", metavar="PATTERN"),
    Flag("--exclude", "calibrate.exclude", CALIBRATION, "calibrate", metavar="PATTERN"),
    # Prehab aims at the ranks that truncation will choose.
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
    # Block-wise refinement, and the size of its batches, is part of truncation, and so of what prehab aims at.
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
    Flag("--ort/--no-ort", "ort", EXPORT, "export"),  # with it, ``export`` goes on to the stage ``ort``
    Flag("--quantize", "quantize", QUANTISATION, "prehab", MODES),  # ranks fill whole blocks where a mode has some
    Flag("--bench-threads", "bench.thread_counts", BENCH, "bench", metavar="N"),
    Flag("--bench-batch", "bench.batch_sizes", BENCH, "bench", metavar="N"),
    Flag("--bench-length", "bench.sequence_lengths", BENCH, "bench", metavar="TOKENS"),
    Flag("--new-tokens", "bench.new_tokens", BENCH, "bench", metavar="N"),
    Flag("--provider", "bench.provider", BENCH, "bench", tuple(PROVIDERS), metavar="PROVIDER"),
    Flag("--min-speedup", "min_speedup", BENCH, "bench", metavar="TIMES"),
)

# What a fit finds by itself, or has no use for.
_OF_A_FIT = {MODEL, DATA, UNUSUAL_DATA, COMPUTE, CALIBRATION, TRUNCATION, EXPORT, QUANTISATION, BENCH}
_NOT_OF_A_FIT = {"truncate.ratio", "truncate.budget", "truncate.objective", "truncate.allocation", "ort"}
_NOT_OF_A_FIT |= {"bench.threads", "bench.thread_counts", "bench.provider", "min_speedup"}
# What a sweep goes through by itself.
_OF_A_SWEEP = {MODEL, DATA, UNUSUAL_DATA, COMPUTE, CALIBRATION, TRUNCATION, REFINEMENT}
_NOT_OF_A_SWEEP = {"truncate.ratio", "truncate.budget", "truncate.objective", "truncate.allocation"}
_NOT_OF_A_SWEEP |= {"truncate.drift_correction"}


@cache
def flag_paths() -> dict[str, str]:
    """Name of a flag, without dashes in front → the key that it sets."""
    return {name: flag.path for flag in FLAGS for name in flag.names}


def flags_through(stage: str) -> list[Flag]:
    """The flags that change what the stages through this one make."""
    order = list(DEPENDENCIES)
    return [flag for flag in FLAGS if order.index(flag.stage) <= order.index(stage)]


def sweep_flags() -> list[Flag]:
    return [flag for flag in FLAGS if flag.title in _OF_A_SWEEP and flag.path not in _NOT_OF_A_SWEEP]


def fit_flags() -> list[Flag]:
    return [flag for flag in FLAGS if flag.title in _OF_A_FIT and flag.path not in _NOT_OF_A_FIT]


def with_flags(flags: Iterable[Flag]) -> Any:
    return decorated(*(flag.option for flag in flags))


def advice_on(name: str, verb: str) -> str | None:
    """What to say of a flag that a verb does not have; None where nothing is known of it."""
    bare = name.lstrip("-")
    flag = next((flag for flag in FLAGS if bare in flag.names), None)
    if flag is not None:
        return f"{verb} does not depend on it; --set {flag.path}=VALUE keeps it for the verbs that do"
    keys = {path.replace(".", "-").replace("_", "-"): path for path in known_keys()}
    if (path := keys.get(bare.removeprefix("no-"))) is not None:
        return f"set it by its key: --set {path}=VALUE"
    return None
