"""All options of a run, with one section per stage.

A YAML file of options has the same structure as ``RunConfig``. Messages name the command-line flag of an option, or its
full name if it has no flag. Help texts are generated from the docstrings of the dataclasses. This module does not load
torch, because the command line builds its options from these defaults.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from converters.errors import InputError
from converters.onnx.modes import BLOCK, BLOCK_MODES, FULL, KV_CACHES, MODES
from prehab_export.config.bench import BenchConfig
from prehab_export.config.calibrate import CalibrateConfig
from prehab_export.config.checks import AUTO, check_choice
from prehab_export.config.compute import DTYPES, check_device_name, check_precision, memory_bytes
from prehab_export.config.data import DataConfig
from prehab_export.config.training import PrehabConfig, RefineConfig, RehabConfig
from prehab_export.config.truncate import TruncateConfig

# Whether a run has a graph of the dense model: if it fits, always or never.
ALWAYS, NEVER = "always", "never"
DENSE_GRAPHS = (AUTO, ALWAYS, NEVER)
TASK_NAMES = ("image-classification", "text-classification", "text-generation")


@dataclass(frozen=True)
class RunConfig:
    """Options of a whole run; each stage has its own section.

    model: folder or hub id of the dense model.
    task: what the model does: ``image-classification``, ``text-classification`` or ``text-generation``.
    adapter: PEFT adapter of the dense model (LoRA, DoRA, IA3 …), merged before anything else.
    revision: branch, tag or commit of a hub model.
    trust_remote_code: run code that comes with the model.
    seed: seed of all random numbers.
    device: device to calibrate and train on: ``auto`` (CUDA if available), ``cpu``, ``cuda`` or ``cuda:N``. The
        artifact is exported, verified and measured on the CPU.
    max_memory: memory that the run may take, such as ``16GB``; ``auto`` is what is free. Samples are processed in
        smaller pieces if that keeps it; a run that would still take more is refused, or only warned of with ``auto``.
    precision: number format of forward passes in calibration and training; weights and moments stay float32.
    dtype: number format of the artifact's weights; ``auto`` is the format of most of the source's weights. Everything
        is computed in float32 and rounded once, when the artifact is written; graphs hold the rounded weights as
        float32.
    dense_graph: whether to export the dense model, too, to measure against it: ``always``, ``never``, or if it fits
        (``auto``). It fits if its export takes no more than ``max_memory`` or, without it, the memory of
        this machine, and if the disk has room. Without a graph, the dense model is only evaluated, in PyTorch.
    quantize: smaller graph to write in addition, of both the compressed and the dense model; ranks become multiples of
        its block size if it has blocks.
    kv_cache: what a compressed decoder caches for past tokens: keys and values (``full``), or the latents of low-rank
        layers (``latent-values`` for values only, ``latent`` for both).
    ort: also write the compressed graphs in ONNX Runtime's ORT format, with the list of operators that a minimal build
        must include.
    quantize_refit: refit the factors to the grid of each quantised graph, and keep them if held-out samples improve.
    min_speedup: minimum speedup of each compressed graph over the dense one; if it is not reached, the run fails with
        exit code 4 after all measurements.

    Raises:
        InputError: a value is out of range, or options contradict each other.
    """

    model: str
    task: str
    data: DataConfig
    adapter: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    device: str = "auto"
    max_memory: str = AUTO
    precision: str = "float32"
    dtype: str = AUTO
    dense_graph: str = AUTO
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
        check_choice("--task", self.task, TASK_NAMES)
        check_choice("--kv-cache", self.kv_cache, KV_CACHES)
        if self.kv_cache != FULL and self.task != "text-generation":
            raise InputError(f"--kv-cache {self.kv_cache} is for --task text-generation; {self.task} has no cache")
        if self.truncate.latency is not None and self.bench.provider != "cpu":
            raise InputError("--budget latency is measured on the CPU; use --provider cpu, or --ratio instead")
        check_choice("--dense-graph", self.dense_graph, DENSE_GRAPHS)
        if self.dense_graph == NEVER:
            self._check_without_dense_graph()
        for mode in self.quantize:
            check_choice("--quantize", mode, MODES)
        check_device_name(self.device)
        memory_bytes(self.max_memory)
        check_precision(self.precision)
        check_choice("--dtype", self.dtype, DTYPES)

    def _check_without_dense_graph(self) -> None:
        """Refuse options that compare times with those of the dense graph."""
        if self.min_speedup is not None:
            raise InputError(
                "--min-speedup compares with the dense graph, which --dense-graph never leaves out; use always or auto"
            )
        if self.truncate.latency is not None:
            raise InputError(
                "--budget latency is a share of the dense model's time, which cannot be checked with --dense-graph "
                "never; use always or auto, or --ratio instead"
            )

    @property
    def cut(self) -> TruncateConfig:
        """The truncation options to use. They are the user's (``truncate``), with ranks in multiples of the block size
        of the quantised graphs unless the user gives a multiple. A rank that does not fill its last block is stored as
        if it did."""
        if self.truncate.rank_multiple is not None or not set(self.quantize) & set(BLOCK_MODES):
            return self.truncate
        return replace(self.truncate, rank_multiple=BLOCK)

    @property
    def needs_gradients(self) -> bool:
        """Whether calibration must collect gradient moments."""
        return self.truncate.needs_gradients or self.prehab.needs_gradients


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the config with absolute local paths, so that a saved run can be resumed from any folder. Hub ids stay."""

    def absolute(source: str | None) -> str | None:
        return source if source is None or not Path(source).exists() else str(Path(source).resolve())

    data = replace(config.data, data=absolute(config.data.data) or config.data.data)
    return replace(config, model=absolute(config.model) or config.model, adapter=absolute(config.adapter), data=data)


def public_names(config: RunConfig) -> RunConfig:
    """Return the config with local paths reduced to their last part, because the rest concerns only one machine. Hub
    ids stay."""

    def name(source: str) -> str:
        return Path(source).resolve().name if Path(source).exists() else source

    adapter = None if config.adapter is None else name(config.adapter)
    return replace(
        config, model=name(config.model), adapter=adapter, data=replace(config.data, data=name(config.data.data))
    )
