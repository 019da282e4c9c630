"""What a run is asked to do: one frozen dataclass a stage, checked when made.

Light on purpose: the command line builds its options from these defaults without loading torch. Messages name the
command line's flags, or an option's own name where it has none; a YAML file has the shape of ``RunConfig``, one section
a stage. The meaning of every field stands in the docstring of its class, of which help texts are made.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from converters.errors import InputError
from converters.onnx.modes import BLOCK, BLOCK_MODES, FULL, KV_CACHES, MODES
from prehab_export.config.bench import BenchConfig
from prehab_export.config.calibrate import CalibrateConfig
from prehab_export.config.checks import AUTO, one_of
from prehab_export.config.compute import DTYPES, check_device_name, check_precision
from prehab_export.config.data import DataConfig
from prehab_export.config.training import PrehabConfig, RefineConfig, RehabConfig
from prehab_export.config.truncate import TruncateConfig

TASK_NAMES = ("image-classification", "text-classification", "text-generation")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is asked to do: what is named here, and a section for each part of the work.

    model: folder or hub id of the dense model.
    task: what the model does: ``image-classification``, ``text-classification`` or ``text-generation``.
    adapter: PEFT adapter of the dense model (LoRA, DoRA, IA3 …), merged before anything else.
    revision: branch, tag or commit of a hub model.
    trust_remote_code: run code that comes with the model.
    seed: seed of everything drawn at random.
    device: where to calibrate and train: ``auto`` (CUDA if there is any), ``cpu``, ``cuda`` or ``cuda:N``. The artifact
        is exported, verified and measured on the CPU.
    precision: number format of forward passes there; weights and moments stay float32.
    dtype: number format of the artifact's weights; ``auto`` is that of most of the source's weights. All is computed in
        float32 and rounded once, when the artifact is written; graphs are of the rounded weights, in float32.
    quantize: another graph, smaller, of the compressed and of the dense model; ranks fill whole blocks where it has
        some.
    kv_cache: what a compressed decoder keeps of past tokens: keys and values (``full``), or of low-rank layers their
        latents.
    ort: also write the compressed graphs in ONNX Runtime's own format, with the list of operators that a minimal build
        must keep.
    quantize_refit: fit the factors to each quantised graph's grid, and keep that where held-out samples gain.
    min_speedup: fail with exit code 4, once all is measured, if a compressed graph is not this many times as fast as
        the dense one.
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
        one_of("--task", self.task, TASK_NAMES)
        one_of("--kv-cache", self.kv_cache, KV_CACHES)
        if self.kv_cache != FULL and self.task != "text-generation":
            raise InputError(f"--kv-cache {self.kv_cache} is for --task text-generation; {self.task} has no cache")
        if self.truncate.latency is not None and self.bench.provider != "cpu":
            raise InputError("--budget latency counts times of the CPU; take --provider cpu, or --ratio")
        for mode in self.quantize:
            one_of("--quantize", mode, MODES)
        check_device_name(self.device)
        check_precision(self.precision)
        one_of("--dtype", self.dtype, DTYPES)

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


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Local paths made absolute, so that a saved run can be gone on with from anywhere; hub ids stay."""

    def absolute(name: str | None) -> str | None:
        return name if name is None or not Path(name).exists() else str(Path(name).resolve())

    data = replace(config.data, data=absolute(config.data.data) or config.data.data)
    return replace(config, model=absolute(config.model) or config.model, adapter=absolute(config.adapter), data=data)


def public_names(config: RunConfig) -> RunConfig:
    """Hub ids as they are; of local paths only the last part, since the rest is one machine's business."""

    def name(place: str) -> str:
        return Path(place).resolve().name if Path(place).exists() else place

    adapter = None if config.adapter is None else name(config.adapter)
    return replace(
        config, model=name(config.model), adapter=adapter, data=replace(config.data, data=name(config.data.data))
    )
