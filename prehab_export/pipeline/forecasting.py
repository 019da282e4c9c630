"""``--dry-run``: what a command would do, before it does it. Input is refused as it would be; nothing is written."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from converters.coverage import Coverage
from converters.dtypes import DTYPES
from prehab_export.compression import ranks_by
from prehab_export.config import RunConfig
from prehab_export.pipeline.checks import check, disk_estimate
from prehab_export.pipeline.effort import Counts, Effort
from prehab_export.pipeline.graph_sizes import Numbers
from prehab_export.pipeline.memory import ASSUMPTION, Memory
from prehab_export.pipeline.pace import measured_pace
from prehab_export.pipeline.preflight import check_export
from prehab_export.pipeline.running import EXPORTING, select_valid, through
from prehab_export.pipeline.session import Session, prepare_process
from prehab_export.pipeline.stages.table import STAGES
from prehab_export.pipeline.workload import Layer, Workload, workload
from prehab_export.pipeline.workspace import Workspace
from prehab_export.system import check_disk_space, free_space, machine_facts

UP_TO_DATE, TO_DO, IF_CHANGED, UNWANTED = "up to date", "to do", "if changed", "not wanted"


@dataclass(frozen=True)
class LayerForecast:
    """Layers of one kind and shape (out×in). ranks: the lowest and the highest; None where they stay dense, or are not
    known."""

    kind: str
    shape: tuple[int, int]
    layers: int
    ranks: tuple[int, int] | None


@dataclass(frozen=True)
class StageForecast:
    """state: ``up to date``, ``to do``, ``if changed`` (to do only if what is done again before it comes out otherwise)
    or ``not wanted``. seconds and memory_bytes: of what is or may be to do, estimates."""

    stage: str
    state: str
    seconds: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class SizeForecast:
    """Bytes before and after; ``after`` is None where ranks are not known."""

    name: str
    before: int
    after: int | None


@dataclass(frozen=True)
class Forecast:
    """What a command would do.

    coverage: what the selected layers hold of the model. layers: their ranks, which ``ranks_from`` says the origin of.
    selected, total: parameters before and after. sizes: of weight files and graphs. stages: in their order. disk_bytes:
    that it needs beside what is there; memory_bytes: that it holds at most. notes: what else should be known.
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
    memory_free_bytes: int
    pace: dict[str, float]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of what is to do for certain."""
        return sum(stage.seconds or 0.0 for stage in self.stages if stage.state == TO_DO)

    def facts(self) -> dict[str, Any]:
        """As JSON types."""
        own = asdict(self)
        return own | {"coverage": self.coverage.facts(), "seconds": self.seconds, "memory_assumes": ASSUMPTION}


def forecast(config: RunConfig, output: Path, *, until: str = "report", redo: Collection[str] = ()) -> Forecast:
    """What bringing the run's folder up to date through stage ``until`` would do and take; the folder is only read, and
    need not be there.

    Args:
        redo: stages to do again although they are up to date.

    Raises:
        InputError: what `run` would refuse.
    """
    prepare_process(config)
    session = Session(config, Workspace.looked_at(output))
    check(session)
    valid: set[str] = set()
    if session.workspace.has_results:
        select_valid(session)
        valid = set(session.workspace.current) - set(redo)
        select_valid(session, redo)
    stages = through(until)
    if any(stage in EXPORTING and not session.workspace.has(stage) for stage in stages):
        check_export(session)
    there = sum(session.workspace.size(stage, key) for stage, key in session.workspace.current.items())
    needed = max(0, disk_estimate(session) - there)
    check_disk_space(output, needed)
    return _forecast(session, stages, valid, needed)


def _forecast(session: Session, names: list[str], valid: Collection[str], disk: int) -> Forecast:
    load, config = workload(session), session.config
    counts = Counts(len(session.calibration), len(session.held_out), len(session.data.evaluation))
    planned = _planned(session, load)
    after = None if planned.ranks is None else planned.parameters
    kept = config.cut.keep if after is None else after / load.selected
    effort, memory = Effort(config, load, counts, kept), Memory(config, load, kept)
    pace = measured_pace(session.device)
    own = psutil.Process().memory_info().rss
    stages = []
    for name in names:
        if not STAGES[name].wanted(config):
            stages.append(StageForecast(name, UNWANTED))
        elif session.workspace.has(name):
            stages.append(StageForecast(name, UP_TO_DATE))
        else:
            held = round(own + memory.of(name))
            state = IF_CHANGED if name in valid else TO_DO
            stages.append(StageForecast(name, state, effort.of(name).at(pace), held))
    total = None if after is None else load.parameters - load.selected + after
    return Forecast(
        session.coverage,
        tuple(_by_kind(load, planned.ranks)),
        planned.origin,
        SizeForecast("selected layers", load.selected, after),
        SizeForecast("whole model", load.parameters, total),
        tuple(_sizes(session, total)),
        tuple(stages),
        disk,
        free_space(session.workspace.root),
        max(own, *(stage.memory_bytes or 0 for stage in stages)),
        own + _free_memory(),
        asdict(pace),
        tuple(_notes(session, planned, names)),
    )


@dataclass(frozen=True)
class _Planned:
    """Rank by layer, None for dense; no ranks at all where they cannot be foretold. parameters: of all layers."""

    ranks: dict[str, int | None] | None
    parameters: int
    origin: str


def _planned(session: Session, load: Workload) -> _Planned:
    """The ranks of the cut that is there, if it is one of these options, or those of an equal share everywhere."""
    cut, workspace = session.config.cut, session.workspace
    if workspace.has("truncate"):
        rows = workspace.read_json("truncate", "truncate.json")["layers"]
        parameters = sum(row["parameters_after"] for row in rows)
        return _Planned({row["name"]: row["rank"] for row in rows}, parameters, "the truncation that is there")
    if cut.latency is not None:
        return _Planned(None, load.selected, "measured times, which are not known yet")
    shapes = {layer.name: (layer.m, layer.n) for layer in load.layers}
    ranks = dict(ranks_by(shapes, ({}, {}), replace(cut, allocation="uniform")).ranks)
    parameters = sum(_parameters(layer, ranks[layer.name]) for layer in load.layers)
    return _Planned(ranks, parameters, "an equal share for every layer")


def _parameters(layer: Layer, rank: int | None) -> int:
    return layer.m * layer.n if rank is None else rank * (layer.m + layer.n)


def _by_kind(load: Workload, ranks: dict[str, int | None] | None) -> list[LayerForecast]:
    kinds: dict[tuple[str, tuple[int, int]], list[int | None]] = {}
    for layer in load.layers:
        rank = None if ranks is None else ranks[layer.name]
        kinds.setdefault((layer.kind, (layer.m, layer.n)), []).append(rank)
    found = []
    for (kind, shape), own in kinds.items():
        cut = [rank for rank in own if rank is not None]
        found.append(LayerForecast(kind, shape, len(own), (min(cut), max(cut)) if cut else None))
    return found


def _sizes(session: Session, total: int | None) -> list[SizeForecast]:
    """Of the weight files, and of each graph of the run."""
    load = Numbers.of(session.empty_model)
    count = load.matrices + load.tables + load.rest
    removed = None if total is None else count - total
    width = DTYPES[session.artifact_dtype].itemsize
    found = [
        SizeForecast(f"weight files, {session.artifact_dtype}", width * count, None if total is None else width * total)
    ]
    for mode in ("float32", *dict.fromkeys(session.config.quantize)):
        after = None if removed is None else load.bytes(mode, removed)
        found.append(SizeForecast(f"ONNX graph, {mode}", load.bytes(mode), after))
    return found


def _free_memory() -> int:
    """What this process may still take: of the machine, or of its control group."""
    limit = machine_facts()["memory_limit_mb"]
    free = psutil.virtual_memory().available
    return free if limit is None else min(free, int(limit * 1e6) - psutil.Process().memory_info().rss)


def _notes(session: Session, planned: _Planned, names: list[str]) -> list[str]:
    config = session.config
    notes = []
    if planned.ranks is not None and not session.workspace.has("truncate"):
        if config.cut.allocation == "loss":
            notes.append("ranks will move between layers by predicted loss, within the same number of parameters")
    elif planned.ranks is None:
        notes.append("a budget of latency needs measured times: ranks and sizes are known once `truncate` is done")
    if session.device.type != "cpu":
        notes.append(
            "times count products at the device's measured pace, and memory is counted as if it were the CPU's"
        )
    if "bench" in names and config.min_speedup is not None:
        notes.append("whether --min-speedup is kept is known once all is measured")
    return notes
