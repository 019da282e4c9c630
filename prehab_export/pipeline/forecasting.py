"""``--dry-run``: report what a command would do. Bad input is refused as usual, and nothing is written."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from converters.coverage import Coverage
from converters.dtypes import DTYPES
from prehab_export.config import RunConfig
from prehab_export.pipeline.checks import check, disk_needed
from prehab_export.pipeline.dense_graph_choice import check_comparisons
from prehab_export.pipeline.estimating import TO_DO, RankForecast, StageForecast, check_memory, estimate_stages
from prehab_export.pipeline.graph_sizes import ParameterCounts
from prehab_export.pipeline.memory import ASSUMPTION
from prehab_export.pipeline.preflight import check_export
from prehab_export.pipeline.running import EXPORT_STAGES, select_valid, select_with_dense_graph, stages_through
from prehab_export.pipeline.session import Session, prepare_process
from prehab_export.pipeline.workload import Workload
from prehab_export.pipeline.workspace import Workspace
from prehab_export.system import check_disk_space, free_space


@dataclass(frozen=True)
class LayerForecast:
    """Layers of one kind and shape (out×in).

    layers: the number of layers.
    ranks: the lowest and the highest rank; None if the layers stay dense or the ranks are unknown.
    """

    kind: str
    shape: tuple[int, int]
    layers: int
    ranks: tuple[int, int] | None


@dataclass(frozen=True)
class SizeForecast:
    """A size before and after compression, in bytes or parameters; ``after`` is None if the ranks are unknown."""

    name: str
    before: int
    after: int | None


@dataclass(frozen=True)
class Forecast:
    """What a command would do.

    coverage: the share of the model that the selected layers hold.
    layers: the selected layers and their ranks.
    ranks_from: the source of the ranks, in words.
    selected, total: parameters of the selected layers and of the whole model.
    sizes: bytes of weight files and graphs.
    stages: in execution order.
    disk_bytes, disk_free_bytes: disk space that the command needs in addition to existing results, and free space.
    memory_bytes, mapped_bytes: the peak memory of this process, and the part of it that is mapped files.
    memory_free_bytes: the memory that the process may take, by ``--max-memory`` or because it is free.
    pace: the measured speed of this machine (`Pace`).
    notes: further remarks for the user.
    """

    coverage: Coverage
    layers: tuple[LayerForecast, ...]
    ranks_from: str
    selected: SizeForecast
    total: SizeForecast
    sizes: tuple[SizeForecast, ...]
    stages: tuple[StageForecast, ...]
    disk_bytes: int
    disk_free_bytes: int
    memory_bytes: int
    mapped_bytes: int
    memory_free_bytes: int
    pace: dict[str, float]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """The estimated time of all stages that are certain to run."""
        return sum(stage.seconds or 0.0 for stage in self.stages if stage.state == TO_DO)

    def facts(self) -> dict[str, Any]:
        """Return the forecast as JSON types."""
        return asdict(self) | {"coverage": self.coverage.facts(), "seconds": self.seconds, "memory_assumes": ASSUMPTION}


def forecast(config: RunConfig, output: Path, *, until: str = "report", redo: Collection[str] = ()) -> Forecast:
    """Estimate what `run` would do and cost. The folder is only read and need not exist.

    Args:
        output: the run's folder.
        until: the last stage of the run.
        redo: stages to repeat even if they are up to date.

    Raises:
        InputError: `run` would refuse the input.
        StorageError: the disk has too little space.
    """
    prepare_process(config)
    session = Session(config, Workspace.open_read_only(output))
    check(session)
    session = select_with_dense_graph(session, redo)
    check_comparisons(session)
    valid: set[str] = set()
    if session.workspace.has_results:
        select_valid(session)
        valid = set(session.workspace.current) - set(redo)
        select_valid(session, redo)
    stages = stages_through(until)
    if any(stage in EXPORT_STAGES and not session.workspace.has(stage) for stage in stages):
        check_export(session)
    disk_bytes = disk_needed(session)
    check_disk_space(output, disk_bytes)
    return _forecast(session, stages, valid, disk_bytes)


def _forecast(session: Session, names: list[str], valid: Collection[str], disk_bytes: int) -> Forecast:
    estimate = estimate_stages(session, names, valid)
    check_memory(session, estimate)
    workload, plan = estimate.workload, estimate.plan
    after = None if plan.ranks is None else plan.parameters
    total = None if after is None else workload.parameters - workload.selected + after
    return Forecast(
        session.coverage,
        tuple(_group_layers(workload, plan.ranks)),
        plan.origin,
        SizeForecast("selected layers", workload.selected, after),
        SizeForecast("whole model", workload.parameters, total),
        tuple(_sizes(session, total)),
        estimate.stages,
        disk_bytes,
        free_space(session.workspace.root),
        estimate.peak.memory_bytes,
        estimate.peak.mapped_bytes,
        estimate.allowed,
        asdict(estimate.pace),
        tuple(_notes(session, plan, names)),
    )


def _group_layers(workload: Workload, ranks: dict[str, int | None] | None) -> list[LayerForecast]:
    """Return a forecast for each kind and shape of layer."""
    kinds: dict[tuple[str, tuple[int, int]], list[int | None]] = {}
    for layer in workload.layers:
        rank = None if ranks is None else ranks[layer.name]
        kinds.setdefault((layer.kind, (layer.m, layer.n)), []).append(rank)
    forecasts = []
    for (kind, shape), kind_ranks in kinds.items():
        low_ranks = [rank for rank in kind_ranks if rank is not None]
        bounds = (min(low_ranks), max(low_ranks)) if low_ranks else None
        forecasts.append(LayerForecast(kind, shape, len(kind_ranks), bounds))
    return forecasts


def _sizes(session: Session, total: int | None) -> list[SizeForecast]:
    """Return the sizes of the weight files and of each graph of the run.

    Args:
        total: the model's parameters after compression; None if they are unknown.
    """
    counts = ParameterCounts.of(session.empty_model)
    count = counts.matrices + counts.tables + counts.others
    removed = None if total is None else count - total
    width = DTYPES[session.artifact_dtype].itemsize
    sizes = [
        SizeForecast(f"weight files, {session.artifact_dtype}", width * count, None if total is None else width * total)
    ]
    for mode in ("float32", *dict.fromkeys(session.config.quantize)):
        after = None if removed is None else counts.bytes(mode, removed)
        sizes.append(SizeForecast(f"ONNX graph, {mode}", counts.bytes(mode), after))
    return sizes


def _notes(session: Session, plan: RankForecast, names: list[str]) -> list[str]:
    config = session.config
    notes = []
    if plan.ranks is not None and not session.workspace.has("truncate"):
        if config.cut.allocation == "loss":
            notes.append("ranks will move between layers by predicted loss, within the same number of parameters")
    elif plan.ranks is None:
        notes.append("a latency budget needs measured times: ranks and sizes are known once `truncate` is done")
    if session.device.type != "cpu":
        notes.append("times use the device's measured pace, but memory is estimated as on the CPU")
    if "baseline" in names and session.missing_dense_graph is not None:
        reason = session.missing_dense_graph.reason
        notes.append(f"no dense graph is made, and sizes of one are what they would be: {reason}")
    if "bench" in names and config.min_speedup is not None:
        notes.append("--min-speedup is checked only after the graphs are measured")
    return notes
