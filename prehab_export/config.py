"""What a run is asked to do: one frozen dataclass a stage, checked when made.

Light on purpose: the command line builds its options from these defaults without loading torch. Messages name the
command line's flags; a YAML file has the shape of ``RunConfig``, one section a stage.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from converters.errors import InputError
from converters.onnx.modes import BLOCK, BLOCK_MODES, FULL, KV_CACHES, MODES
from prehab_export.bench_config import BenchConfig

TASK_NAMES = ("image-classification", "text-classification", "text-generation")
OBJECTIVES = ("weight", "activation", "fisher", "auto")
ALLOCATIONS = ("uniform", "loss")
SURROGATES = ("tail", "nuclear", "stable-rank", "spectral", "stochastic-stable-rank")
UPDATES = ("gradient", "proximal")
PROXIMAL_SURROGATES = ("tail", "nuclear")
LAYER_WEIGHTS = ("loss", "fisher", "equal")
SCHEDULES = ("constant", "warmup")
WHITENINGS = ("activation", "fisher")
FISHER_LABELS = ("data", "model")
WINDOW_STARTS = ("auto", "bos", "none")
AUTO = "auto"
PARAMETERS = "parameters"
USUAL_STRENGTH = 100.0
REHAB_METHODS = ("factors", "all", "lora")
DTYPES = (AUTO, "float32", "bfloat16", "float16")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and which of them; None means: find it.

    data: hub id, folder or file, or ``sklearn-digits``. sequence_length: window of a language model, longest text
    of a classifier. window_start: what each window of a language model starts with: ``auto`` (what the tokenizer puts
    before a text), ``bos`` (its BOS token) or ``none``. labels_by_position: class names of the data are not looked up
    among the model's, they stand in the same order. encoding, delimiter, header: of text, csv and JSON files; columns
    of a csv without a header are column1, column2 and so on.
    """

    data: str
    data_config: str | None = None
    train_split: str | None = None
    eval_split: str | None = None
    input_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    labels_by_position: bool = False
    encoding: str | None = None
    delimiter: str | None = None
    header: bool | None = None
    sequence_length: int | None = None
    window_start: str = AUTO
    eval_samples: int | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        _at_least("--batch-size", self.batch_size, 1)
        _at_least("--sequence-length", self.sequence_length, 2)
        _one_of("--window-start", self.window_start, WINDOW_STARTS)
        if self.delimiter is not None and len(self.separator or "") != 1:
            raise InputError(f"--delimiter must be one character, or tab, not {self.delimiter!r}")
        _check_encoding(self.encoding)
        _at_least("--eval-samples", self.eval_samples, 1)

    @property
    def separator(self) -> str | None:
        """The delimiter itself."""
        return "\t" if self.delimiter in ("tab", "\\t") else self.delimiter


@dataclass(frozen=True)
class CalibrateConfig:
    """samples: how many to look at. labels: ``data`` (given ones) or ``model`` (drawn from the model's output).
    include/exclude: shell-style patterns on layer names."""

    samples: int = 512
    labels: str = "data"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _at_least("--calibration-samples", self.samples, 1)
        _one_of("--fisher-labels", self.labels, FISHER_LABELS)


@dataclass(frozen=True)
class Schedule:
    """steps of batch_size samples; learning_rate is the peak, reached after the share ``warmup`` of the steps."""

    steps: int = 0
    batch_size: int = 32
    learning_rate: float = 3e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        _at_least("the number of steps", self.steps, 0)
        _at_least("the batch size", self.batch_size, 1)
        if not 0 < self.learning_rate < 1:
            raise InputError(f"the learning rate must lie between 0 and 1, not {self.learning_rate}")


@dataclass(frozen=True)
class TrainConfig(Schedule):
    """A schedule, and the loss: distill in [0, 1] is the share that is the KL divergence from the dense model's
    output; 0 trains on the labels alone."""

    distill: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _share("the distillation share", self.distill)


@dataclass(frozen=True)
class RefineSchedule(Schedule):
    """Small batches: as many samples in more steps leave a smaller divergence from the dense model."""

    batch_size: int = 8
    learning_rate: float = 5e-4


@dataclass(frozen=True)
class RefineConfig:
    """Tuning of the factors towards the dense model, without labels.

    schedule: of the end-to-end part, on the inputs of all training samples. block_steps, block_learning_rate: of the
    block-wise part, per block, on the calibration sample.
    hidden_share: share of the end-to-end loss that is the error of hidden states.
    """

    schedule: RefineSchedule = field(default_factory=RefineSchedule)
    block_steps: int = 0
    block_learning_rate: float = 1e-3
    hidden_share: float = 0.0

    def __post_init__(self) -> None:
        _at_least("--refine-block-steps", self.block_steps, 0)
        _share("--refine-hidden", self.hidden_share)

    @property
    def block_schedule(self) -> Schedule:
        return replace(self.schedule, steps=self.block_steps, learning_rate=self.block_learning_rate)


@dataclass(frozen=True)
class PrehabConfig:
    """How to prehab.

    strength: λ, or ``auto`` to find it by at most ``trials`` short trials. The surrogate is 1 at the start, so that λ
    means the same for every model.
    schedule: ``constant``, or ``warmup`` (λ rises exponentially over the first half).
    whitening: ``activation`` (C alone) or ``fisher`` (C and G).
    update: ``gradient`` (the surrogate's gradient joins the task's) or ``proximal`` (the weight is shrunk directly, as
    by decoupled weight decay: a rate of λ times the learning rate a step).
    every: each layer's surrogate is evaluated once in so many steps; its gradient is held in between.
    layer_weights: λ of a layer relative to the others: in proportion to the ``loss`` that truncation is predicted to
    cost there, to its ``fisher`` energy tr(G W C Wᵀ), or ``equal``.
    refresh_every: steps between fresh moments, bases and, under ``loss`` allocation, ranks.
    refresh_samples: samples that a refresh looks at.
    guard: keep the result only if the truncated model is better for it on held-out samples.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    surrogate: str = "tail"
    strength: float | str = USUAL_STRENGTH
    trials: int = 5
    schedule: str = "constant"
    whitening: str = "fisher"
    update: str = "proximal"
    every: int = 8
    layer_weights: str = "loss"
    refresh_every: int = 64
    refresh_samples: int = 32
    guard: bool = True

    def __post_init__(self) -> None:
        _one_of("--surrogate", self.surrogate, SURROGATES)
        _one_of("--prehab-schedule", self.schedule, SCHEDULES)
        _one_of("--prehab-whitening", self.whitening, WHITENINGS)
        _one_of("--prehab-update", self.update, UPDATES)
        if self.update == "proximal" and self.surrogate not in PROXIMAL_SURROGATES:
            raise InputError(
                f"--surrogate {self.surrogate} has no proximal map; give --prehab-update gradient, or one of "
                f"{', '.join(PROXIMAL_SURROGATES)}"
            )
        _one_of("--prehab-layer-weights", self.layer_weights, LAYER_WEIGHTS)
        _at_least("--prehab-every", self.every, 1)
        _at_least("--prehab-refresh", self.refresh_every, 1)
        _at_least("the samples of a refresh", self.refresh_samples, 1)
        _at_least("--prehab-lambda-trials", self.trials, 1)
        if self.strength != AUTO and not (isinstance(self.strength, float) and 0 <= self.strength < float("inf")):
            raise InputError(f"--prehab-lambda must be auto, or a number of 0 or more, not {self.strength}")

    @property
    def needs_gradients(self) -> bool:
        return self.train.steps > 0 and (self.whitening == "fisher" or self.layer_weights != "equal")


@dataclass(frozen=True)
class TruncateConfig:
    """How to truncate.

    ratio: share of the targeted layers' parameters to remove, in (0, 1).
    budget: ``parameters``, as ``ratio`` has it, or ``latency:SHARE``: the targeted layers are to take that share of the
        time that they take dense, by measured times of this machine; ``ratio`` then counts for nothing.
    objective: ``weight``, ``activation``, ``fisher``, or ``auto``: fisher, but activation for the kinds of layer
        (q, k, v …) where a validation pass finds it better.
    share_inputs: under ``loss``, layers with one input (q, k, v) may have one ``down`` between them, where that loses
        less for the same parameters.
    drift_correction: fit each layer to the inputs that the compressed layers before it give, block by block.
    allocation: ``uniform`` (same share everywhere) or ``loss`` (least summed predicted loss).
    rank_multiple: ranks come in multiples of this, or of its half, quarter … where layers are too small for the ratio.
        Not given, it is 1, or in a run the block of the quantised graphs that are made.
    floor_share: under ``loss``, no layer gets less than this share of its uniform rank.
    gradient_shrinkage: least share by which G is shrunk towards the mean of its diagonal; a small sample asks for more.
    """

    ratio: float = 0.6
    budget: str = PARAMETERS
    objective: str = "fisher"
    allocation: str = "loss"
    rank_multiple: int | None = None
    floor_share: float = 0.1
    gradient_shrinkage: float = 1e-2
    drift_correction: bool = True
    share_inputs: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise InputError(f"--ratio must lie between 0 and 1 (share of parameters removed), not {self.ratio}")
        if self.budget != PARAMETERS and not re.fullmatch(r"latency:0?\.\d*[1-9]\d*", self.budget):
            raise InputError(
                f"--budget must be {PARAMETERS}, or latency:SHARE with a share between 0 and 1, such as latency:0.5, "
                f"not {self.budget!r}"
            )
        if self.latency is not None and self.allocation != "loss":
            raise InputError("--budget latency needs --allocation loss: equal ranks do not know what they cost")
        _one_of("--objective", self.objective, OBJECTIVES)
        _one_of("--allocation", self.allocation, ALLOCATIONS)
        _at_least("--rank-multiple", self.rank_multiple, 1)
        _share("--rank-floor", self.floor_share)

    @property
    def multiple(self) -> int:
        """What ranks are multiples of."""
        return self.rank_multiple or 1

    @property
    def latency(self) -> float | None:
        """The share of their dense time that the layers may take; None for a budget of parameters."""
        return None if self.budget == PARAMETERS else float(self.budget.partition(":")[2])

    @property
    def keep(self) -> float:
        """The share of what the dense layers cost that is kept."""
        return 1 - self.ratio if self.latency is None else self.latency

    @property
    def goal(self) -> str:
        """The budget as the command line has it."""
        return f"--ratio {self.ratio}" if self.latency is None else f"--budget {self.budget}"

    @property
    def needs_gradients(self) -> bool:
        return self.base_objective == "fisher" or self.allocation == "loss"

    @property
    def base_objective(self) -> str:
        """The objective of a layer that no measurement has spoken for."""
        return "fisher" if self.objective == "auto" else self.objective


@dataclass(frozen=True)
class RehabConfig:
    """How to rehab.

    method: ``factors``, ``all`` (factors, and what was never cut) or ``lora``. lora_rank: the adapters' rank.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    method: str = "factors"
    lora_rank: int = 16

    def __post_init__(self) -> None:
        _one_of("--rehab-method", self.method, REHAB_METHODS)
        _at_least("--lora-rank", self.lora_rank, 1)


def check_device_name(name: str) -> None:
    """Raises:
    InputError: neither ``auto``, ``cpu``, ``cuda`` nor ``cuda:N``.
    """
    if name.partition(":")[0] == "mps":
        raise InputError("--device mps has no float64, which decompositions need; take --device cpu")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}")


def check_precision(name: str) -> None:
    """Raises:
    InputError: not one of ``PRECISIONS``.
    """
    _one_of("--precision", name, PRECISIONS)


def _check_encoding(name: str | None) -> None:
    try:
        "".encode(name or "utf-8")
    except LookupError as error:
        raise InputError(f"--encoding: no text encoding is called {name!r}; try utf-8, cp1252 or utf-16") from error


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{option} must be one of {', '.join(allowed)}, not {value!r}")


def _at_least(option: str, value: int | None, lowest: int) -> None:
    if value is not None and value < lowest:
        raise InputError(f"{option} must be {lowest} or more, not {value}")


def _share(option: str, value: Any) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{option} must lie between 0 and 1, not {value}")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is asked to do. ``revision`` and ``trust_remote_code`` are transformers' own terms.

    device: where everything up to the artifact is computed: ``auto`` (CUDA if there is any), ``cpu``, ``cuda``,
    ``cuda:N``. The artifact is exported, verified and measured on the CPU.
    quantize: which graphs to make beside the float32 one, of the dense model too; ranks then come in whole blocks where
        the kind of quantisation has blocks.
    kv_cache: what the compressed decoder keeps of past tokens: keys and values, or of low-rank layers their latents.
    ort: also write the compressed graphs in ONNX Runtime's own format, for minimal builds.
    quantize_refit: fit the factors to each quantised graph's grid, and keep that where held-out samples gain.
    min_speedup: a run fails, once all is measured, if a compressed graph is less times as fast as the dense one.
    precision: of forward passes there; weights, moments and decompositions stay float32 and float64.
    dtype: of the artifact's weights: ``auto`` (that of most of the source's weights), ``float32``, ``bfloat16``,
        ``float16``. All is computed in float32 and rounded once, when the artifact is written; ONNX graphs are of the
        rounded weights, in float32.
    """

    model: str
    task: str
    data: DataConfig
    adapter: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    dtype: str = AUTO
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    prehab: PrehabConfig = field(default_factory=PrehabConfig)
    truncate: TruncateConfig = field(default_factory=TruncateConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    rehab: RehabConfig = field(default_factory=RehabConfig)
    quantize: tuple[str, ...] = ()
    kv_cache: str = FULL
    ort: bool = False
    quantize_refit: bool = True
    bench: BenchConfig = field(default_factory=BenchConfig)
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        if self.min_speedup is not None and not 0 < self.min_speedup < float("inf"):
            raise InputError(f"--min-speedup must be above 0, not {self.min_speedup}")
        _one_of("--task", self.task, TASK_NAMES)
        _one_of("--kv-cache", self.kv_cache, KV_CACHES)
        if self.kv_cache != FULL and self.task != "text-generation":
            raise InputError(f"--kv-cache {self.kv_cache} is for --task text-generation; {self.task} has no cache")
        if self.truncate.latency is not None and self.bench.provider != "cpu":
            raise InputError("--budget latency counts times of the CPU; take --provider cpu, or --ratio")
        for mode in self.quantize:
            _one_of("--quantize", mode, MODES)
        check_device_name(self.device)
        check_precision(self.precision)
        _one_of("--dtype", self.dtype, DTYPES)

    @property
    def cut(self) -> TruncateConfig:
        """How to truncate, with the multiple of ranks that the quantised graphs ask for where none is given: a rank
        that does not fill its last block is stored as if it did. ``truncate`` is as the user gave it."""
        if self.truncate.rank_multiple is not None or not set(self.quantize) & set(BLOCK_MODES):
            return self.truncate
        return replace(self.truncate, rank_multiple=BLOCK)

    @property
    def needs_gradients(self) -> bool:
        return self.truncate.needs_gradients or self.prehab.needs_gradients


def to_yaml(config: RunConfig) -> str:
    """The options as a YAML document that ``from_dict`` reads back."""
    import yaml

    plain = json.loads(json.dumps(asdict(config)))  # tuples become lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a config from nested mappings, the inverse of ``dataclasses.asdict``.

    >>> from_dict(TruncateConfig, {"ratio": 0.5}).ratio
    0.5

    Raises:
        InputError: an unknown key, a missing one, or a value of the wrong kind, with its place.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where or 'the options'}: expected a section with keys, found {values!r}")
    kinds = get_type_hints(cls)
    if unknown := sorted(set(values) - set(kinds)):
        raise InputError(f"unknown option {where}{unknown[0]}; known here: {', '.join(kinds)}")
    try:
        return cls(**{key: _converted(kinds[key], value, f"{where}{key}") for key, value in values.items()})
    except TypeError as error:
        raise InputError(f"{where or 'the options'}: {str(error).split('() ')[-1]}") from error


def _number(value: int | str, where: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise InputError(f"{where}: expected a number, found {value!r}") from error


def _converted(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        return from_dict(kind, value, f"{where}.")  # type: ignore[arg-type]
    if get_origin(kind) is UnionType:
        first, second = get_args(kind)
        if value is None and second is type(None):
            return None
        return value if value == AUTO and second is str else _converted(first, value, where)
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_converted(get_args(kind)[0], item, where) for item in items)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        return _number(value, where)  # YAML reads 1e-4 as a string
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{where}: expected {kind.__name__}, found {value!r}")
    return value


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Local paths made absolute, so that a saved run can be gone on with from anywhere; hub ids stay."""

    def absolute(name: str | None) -> str | None:
        return name if name is None or not Path(name).exists() else str(Path(name).resolve())

    data = replace(config.data, data=absolute(config.data.data) or config.data.data)
    return replace(config, model=absolute(config.model) or config.model, adapter=absolute(config.adapter), data=data)
