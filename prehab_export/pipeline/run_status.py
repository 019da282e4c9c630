"""``status``: report what a run's folder holds, which results are stale, and why.

It reads only the folder, so it is quick and needs neither model nor data.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from converters.errors import InputError
from prehab_export.config import RunConfig, from_dict, read_options
from prehab_export.pipeline.stages.dependencies import DEPENDENCIES, enabled_parents
from prehab_export.pipeline.staleness import Staleness, StaleReasons
from prehab_export.pipeline.workspace import OPTIONS_FILE, UNFINISHED, Workspace
from prehab_export.system import read_json

# States of a stage.
CURRENT, STALE, MISSING, DISABLED = "current", "stale", "missing", "not wanted"


@dataclass(frozen=True)
class StageStatus:
    """The state of one stage.

    state: ``current``, ``stale`` (the result does not match the options or inputs), ``missing`` or ``not wanted``.
    made: when the result was made, in ISO 8601 and UTC.
    seconds: how long the stage took.
    bytes: the size of the result.
    reasons: why the result is stale.
    """

    stage: str
    state: str
    made: str | None = None
    seconds: float | None = None
    bytes: int = 0
    reasons: StaleReasons = field(default_factory=StaleReasons)


@dataclass(frozen=True)
class UnusedResults:
    """The number and size of a stage's results that the current options do not need.

    stage: a stage's name, or ``fit`` or ``sweep``.
    """

    stage: str
    results: int
    bytes: int


@dataclass(frozen=True)
class RunStatus:
    """The contents of a run's folder.

    stages: in execution order.
    kept: the results that ``clean`` would remove.
    targets: target name → where and when the run was measured there.
    fit: the verdict of the fit, if there is one.
    sweep: the methods and ratios of the sweep, if there is one.
    notes: further remarks for the user.
    """

    output: Path
    config: RunConfig
    stages: tuple[StageStatus, ...]
    kept: tuple[UnusedResults, ...]
    targets: dict[str, dict[str, Any]]
    fit: str | None
    sweep: dict[str, Any] | None
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Return the status as JSON types."""
        facts = asdict(self) | {"output": str(self.output)}
        del facts["config"]
        return facts | {"model": self.config.model, "task": self.config.task, "data": self.config.data.data}


def status(output: Path) -> RunStatus:
    """Compare what a run's folder holds with the options saved in it.

    Raises:
        InputError: the folder is not a run's, or its options cannot be read.
    """
    workspace = Workspace.open_existing(output)
    if workspace is None or not workspace.has_options:
        raise InputError(f"{output} is not the folder of a run" + (" that has begun" if workspace else ""))
    config = from_dict(RunConfig, read_options(output / OPTIONS_FILE))
    staleness, unused = Staleness(workspace, config, dict(workspace.current)), tuple(_unused_results(workspace))
    return RunStatus(
        output,
        config,
        tuple(_stage_statuses(workspace, config, staleness)),
        unused,
        {path.stem: _target_facts(path) for path in sorted(output.glob("targets/*.json"))},
        (read_json(output / "fit" / "fit.json") or {}).get("verdict"),
        _sweep_facts(read_json(output / "sweep" / "sweep.json")),
        tuple(_notes(workspace, config, staleness)),
    )


def _stage_statuses(workspace: Workspace, config: RunConfig, staleness: Staleness) -> list[StageStatus]:
    """Return the status of every stage: of the result that matches the options, or else of the latest one.

    Matching results are selected in ``workspace``, in memory only, because later stages are compared with them.
    """
    statuses: dict[str, StageStatus] = {}
    for name, stage in DEPENDENCIES.items():
        if not stage.is_enabled(config):
            statuses[name] = StageStatus(name, DISABLED)
            continue
        reasons_by_key = {key: staleness.reasons(name, key) for key in _result_keys(workspace, name)}
        if not reasons_by_key:
            statuses[name] = StageStatus(name, MISSING)
            continue
        key = next((key for key, reasons in reasons_by_key.items() if not reasons), next(iter(reasons_by_key)))
        reasons = reasons_by_key[key]
        outdated = [parent for parent in enabled_parents(stage, config) if statuses[parent].state != CURRENT]
        if not reasons and outdated:
            reasons = StaleReasons(others=(f"{outdated[0]} is {statuses[outdated[0]].state}",))
        if not reasons:
            workspace.select(name, key)
        state, seconds = STALE if reasons else CURRENT, (workspace.manifest(name, key) or {}).get("seconds")
        size = workspace.size(name, key)
        statuses[name] = StageStatus(name, state, _time_made(workspace, name, key), seconds, size, reasons)
    return list(statuses.values())


def _result_keys(workspace: Workspace, stage: str) -> list[str]:
    """Return the keys of a stage's results: the current one first, then the others from new to old."""
    latest_first = sorted(workspace.keys(stage), key=lambda key: _time_made(workspace, stage, key), reverse=True)
    return sorted(latest_first, key=lambda key: key != workspace.current.get(stage))


def _time_made(workspace: Workspace, stage: str, key: str) -> str:
    manifest = workspace.manifest(stage, key) or {}
    if "made" in manifest:
        return manifest["made"]
    folder = workspace.result(stage, key)
    return _modification_time(folder) if folder.exists() else ""


def _modification_time(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")


def _unused_results(workspace: Workspace) -> list[UnusedResults]:
    totals: dict[str, UnusedResults] = {}
    finished = [leftover for leftover in workspace.leftovers() if not leftover.key.endswith(".partial")]
    for leftover in finished:
        name = next((kind for kind in ("fit", "sweep") if leftover.stage.startswith(f"{kind}-")), leftover.stage)
        total = totals.get(name, UnusedResults(name, 0, 0))
        totals[name] = UnusedResults(name, total.results + 1, total.bytes + leftover.bytes)
    return list(totals.values())


def _target_facts(path: Path) -> dict[str, Any]:
    results = read_json(path) or {}
    return {
        "place": results.get("place"),
        "cpu": results.get("device", {}).get("cpu"),
        "measured": _modification_time(path),
    }


def _sweep_facts(result: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if result is None:
        return None
    return {name: list(dict.fromkeys(row[name] for row in result["rows"])) for name in ("method", "ratio")}


def _notes(workspace: Workspace, config: RunConfig, staleness: Staleness) -> list[str]:
    notes = []
    for name, source in (("model", config.model), ("adapter", config.adapter), ("data", config.data.data)):
        if source is not None and Path(source).is_absolute() and not Path(source).exists():
            notes.append(f"the {name} is gone: {source}; existing results stay, but no stage can run again")
    for change, note in (("gone", "is gone"), ("touched", "was written since it was last read; a run will read it")):
        for path in [path for path, kind in staleness.files.items() if kind == change and path.parent.exists()]:
            notes.append(f"{path} {note}")
    for pattern in UNFINISHED:
        for path in workspace.root.glob(pattern):
            name = path.relative_to(workspace.root).as_posix()
            notes.append(f"{name} is unfinished: a command is running here, or was killed")
    return notes
