"""Estimates of time and memory of the stages of a run, and the limits on memory that follow from them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import ceil

import psutil

from converters.errors import InputError
from prehab_export.compression import MemoryLimits, ranks_by
from prehab_export.config import memory_bytes
from prehab_export.pipeline.effort import Counts, Effort
from prehab_export.pipeline.memory import DENSE_GRAPH_STAGES, Memory
from prehab_export.pipeline.pace import Pace, measure_pace
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.stages.table import STAGES
from prehab_export.pipeline.workload import Layer, Workload, count_workload
from prehab_export.system import format_bytes, format_duration, machine_facts, warn

UP_TO_DATE, TO_DO, IF_CHANGED, DISABLED = "up to date", "to do", "if changed", "not wanted"


@dataclass(frozen=True)
class StageForecast:
    """One stage.

    state: ``up to date``, ``to do``, ``if changed`` (to do only if an earlier stage gives a different result) or
        ``not wanted``.
    seconds, memory_bytes: estimates for stages that are to do, or may be.
    mapped_bytes: the part of the memory that is mapped files; the system drops them if memory is short.
    """

    stage: str
    state: str
    seconds: float | None = None
    memory_bytes: int | None = None
    mapped_bytes: int | None = None


@dataclass(frozen=True)
class RankForecast:
    """The expected ranks of the selected layers.

    ranks: layer name → rank, None for a dense layer; None altogether if the ranks cannot be predicted.
    parameters: the parameters of all selected layers at these ranks.
    origin: the source of the ranks, in words.
    """

    ranks: dict[str, int | None] | None
    parameters: int
    origin: str


@dataclass(frozen=True)
class PeakMemory:
    """The stage that takes the most memory (None if none takes any), and what it takes, as in `StageForecast`."""

    stage: str | None
    memory_bytes: int
    mapped_bytes: int


@dataclass(frozen=True)
class Estimate:
    """The time and the memory of a run's stages.

    resident: bytes that this process holds already.
    allowed: bytes that it may hold in all.
    limits: what work on samples may hold at once.
    """

    stages: tuple[StageForecast, ...]
    workload: Workload
    plan: RankForecast
    pace: Pace
    resident: int
    allowed: int
    limits: MemoryLimits

    @property
    def peak(self) -> PeakMemory:
        """The stage that holds the most, mapped files not counted."""
        stages = [stage for stage in self.stages if stage.memory_bytes is not None]
        top = max(stages, key=_held, default=None)
        return PeakMemory(
            None if top is None else top.stage,
            self.resident if top is None else max(self.resident, top.memory_bytes or 0),
            0 if top is None else top.mapped_bytes or 0,
        )

    def sentence(self, disk_bytes: int) -> str:
        """Return the estimate as text.

        Args:
            disk_bytes: disk space that the run needs.
        """
        seconds = sum(stage.seconds or 0.0 for stage in self.stages if stage.state == TO_DO)
        peak = self.peak
        mapped = f", {format_bytes(peak.mapped_bytes)} of it mapped files" if peak.mapped_bytes else ""
        return (
            f"estimate: {format_duration(seconds)}, {format_bytes(peak.memory_bytes)} of memory at peak "
            f"({peak.stage}{mapped}), {format_bytes(disk_bytes)} of disk"
        )


def _held(stage: StageForecast) -> int:
    return (stage.memory_bytes or 0) - (stage.mapped_bytes or 0)


def estimate_stages(
    session: Session, names: Sequence[str], valid: Collection[str] = (), redo: Collection[str] = ()
) -> Estimate:
    """Estimate the stages that are to do, with the largest limits on work on samples that the allowed memory permits.

    Args:
        names: stages in execution order.
        valid: stages that need repeating only if an earlier stage gives a different result.
        redo: stages that are to do even if they have a result.
    """
    workload, config = count_workload(session), session.config
    counts = Counts(len(session.calibration), len(session.held_out), len(session.data.evaluation))
    plan = _plan_ranks(session, workload)
    kept_share = config.cut.keep if plan.ranks is None else plan.parameters / workload.selected
    resident, free = psutil.Process().memory_info().rss, _free_memory()
    allowed = memory_bytes(config.max_memory) or resident + free
    enabled = [name for name in names if STAGES[name].is_enabled(config)]
    to_do = [name for name in enabled if name in redo or not session.workspace.has(name)]
    # What a training stage or a merged adapter wrote is float32.
    half = session.weights.main_half is not None and config.adapter is None and not config.prehab.train.steps
    has_dense_graph = session.missing_dense_graph is None
    effort = Effort(config, workload, counts, kept_share, has_dense_graph)
    memory = Memory(config, workload, kept_share, half, dense_graph=has_dense_graph).within(to_do, allowed - resident)
    pace = measure_pace(session.device)

    def stage_forecast(name: str) -> StageForecast:
        if name not in enabled:
            return StageForecast(name, DISABLED)
        if name not in to_do:
            return StageForecast(name, UP_TO_DATE)
        need = memory.need(name)
        seconds = effort.stage_work(name).at(pace)
        state = IF_CHANGED if name in valid else TO_DO
        return StageForecast(name, state, seconds, round(resident + need.total), round(need.mapped))

    stages = tuple(stage_forecast(name) for name in names)
    return Estimate(stages, workload, plan, pace, resident, allowed, memory.limits)


def check_memory(session: Session, estimate: Estimate) -> None:
    """Refuse a run that would take more memory than ``--max-memory`` allows, or warn if it takes more than is free.

    Mapped files do not count, since the system drops them if memory is short.

    Raises:
        InputError: a stage takes more even with the smallest limits; the message names it.
    """
    top = max((stage for stage in estimate.stages if stage.state == TO_DO), key=_held, default=None)
    if top is None or _held(top) <= estimate.allowed:
        return
    need, advice = format_bytes(_held(top)), _advice(top.stage, session.missing_dense_graph is None)
    if memory_bytes(session.config.max_memory) is None:
        free = format_bytes(estimate.allowed)
        warn(f"{top.stage} may take {need} of memory, and {free} are free; if it fails, {advice}")
        return
    least = f"{ceil(_held(top) / 1e8) / 10:.1f}GB"
    raise InputError(
        f"{top.stage} takes about {need} of memory even in the smallest pieces, and --max-memory allows "
        f"{format_bytes(estimate.allowed)}; give --max-memory {least} or more, or {advice}"
    )


def _advice(stage: str, has_dense_graph: bool) -> str:
    """Return what makes a stage take less memory."""
    switches = {"prehab": "--prehab-steps 0", "refine": "--refine-steps 0", "rehab": "--rehab-steps 0"}
    if stage in switches:
        return f"leave the stage out with {switches[stage]}"
    if stage in ("calibrate", "truncate"):
        return "give shorter windows or exclude the largest layers"
    if has_dense_graph and stage in DENSE_GRAPH_STAGES:
        return "leave the dense graph out with --dense-graph never"
    return "run it on a machine with more memory"


def _plan_ranks(session: Session, workload: Workload) -> RankForecast:
    """Return the ranks of the current truncation if there is one, and otherwise those of a uniform allocation."""
    cut, workspace = session.config.cut, session.workspace
    if workspace.has("truncate"):
        rows = workspace.read_json("truncate", "truncate.json")["layers"]
        parameters = sum(row["parameters_after"] for row in rows)
        return RankForecast({row["name"]: row["rank"] for row in rows}, parameters, "the existing truncation")
    if cut.latency is not None:
        return RankForecast(None, workload.selected, "measured times, which are not known yet")
    shapes = {layer.name: (layer.m, layer.n) for layer in workload.layers}
    ranks = dict(ranks_by(shapes, ({}, {}), replace(cut, allocation="uniform")).ranks)
    parameters = sum(_parameters(layer, ranks[layer.name]) for layer in workload.layers)
    return RankForecast(ranks, parameters, "an equal share for every layer")


def _parameters(layer: Layer, rank: int | None) -> int:
    return layer.m * layer.n if rank is None else rank * (layer.m + layer.n)


def _free_memory() -> int:
    """Return the bytes that this process can still allocate, limited by the machine or by its control group."""
    limit = machine_facts()["memory_limit_mb"]
    free = psutil.virtual_memory().available
    return free if limit is None else min(free, int(limit * 1e6) - psutil.Process().memory_info().rss)
