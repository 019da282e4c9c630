"""``status``: what a run's folder holds, what of it no longer answers to the run's options, and why. Read from the
folder alone: it takes no time, and needs neither model nor data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from converters.errors import InputError
from prehab_export.config import RunConfig, from_dict, read_options
from prehab_export.pipeline.stages.dependencies import DEPENDENCIES, wanted_parents
from prehab_export.pipeline.staleness import Staleness, StaleReasons
from prehab_export.pipeline.workspace import OPTIONS_FILE, UNFINISHED, Workspace
from prehab_export.system import read_json

CURRENT, STALE, MISSING, UNWANTED = "current", "stale", "missing", "not wanted"


@dataclass(frozen=True)
class StageStatus:
    """One stage. state: ``current``, ``stale`` (made, but not of what is asked for now), ``missing`` or ``not wanted``.
    made: when, in UTC; seconds: how long that took; bytes: of the result. reasons: why it is stale."""

    stage: str
    state: str
    made: str | None = None
    seconds: float | None = None
    bytes: int = 0
    reasons: StaleReasons = field(default_factory=StaleReasons)


@dataclass(frozen=True)
class KeptResults:
    """Results that no current option needs, of one stage; fits and sweeps have stages of their own."""

    stage: str
    results: int
    bytes: int


@dataclass(frozen=True)
class RunStatus:
    """What a run's folder holds. stages: in their order. kept: what `clean` would take. targets: name → where and when
    it was measured. fit, sweep: what their tables say, if there are any. notes: what else should be known."""

    output: Path
    config: RunConfig
    stages: tuple[StageStatus, ...]
    kept: tuple[KeptResults, ...]
    targets: dict[str, dict[str, Any]]
    fit: str | None
    sweep: dict[str, Any] | None
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """As JSON types."""
        facts = asdict(self) | {"output": str(self.output)}
        del facts["config"]
        return facts | {"model": self.config.model, "task": self.config.task, "data": self.config.data.data}


def status(output: Path) -> RunStatus:
    """What the folder of a run holds, against the options that are saved there.

    Raises:
        InputError: not the folder of a run, or its options cannot be read.
    """
    workspace = Workspace.existing(output)
    if workspace is None or not workspace.has_options:
        raise InputError(f"{output} is not the folder of a run" + (" that has begun" if workspace else ""))
    config = from_dict(RunConfig, read_options(output / OPTIONS_FILE))
    staleness, kept = Staleness(workspace, config, dict(workspace.current)), tuple(_kept(workspace))
    return RunStatus(
        output,
        config,
        tuple(_stages(workspace, config, staleness)),
        kept,
        {path.stem: _target(path) for path in sorted(output.glob("targets/*.json"))},
        (read_json(output / "fit" / "fit.json") or {}).get("verdict"),
        _sweep(read_json(output / "sweep" / "sweep.json")),
        tuple(_notes(workspace, config, staleness)),
    )


def _stages(workspace: Workspace, config: RunConfig, staleness: Staleness) -> list[StageStatus]:
    """Of each stage the result that answers to the options, or why the last one does not. It becomes the current one
    here, for the stages that read it; nothing of that is kept."""
    found: dict[str, StageStatus] = {}
    for name, stage in DEPENDENCIES.items():
        if not stage.wanted(config):
            found[name] = StageStatus(name, UNWANTED)
            continue
        told = {key: staleness.reasons(name, key) for key in _results(workspace, name)}
        if not told:
            found[name] = StageStatus(name, MISSING)
            continue
        key = next((key for key, reasons in told.items() if not reasons), next(iter(told)))
        reasons = told[key]
        behind = [parent for parent in wanted_parents(stage, config) if found[parent].state != CURRENT]
        if not reasons and behind:
            reasons = StaleReasons(others=(f"{behind[0]} is {found[behind[0]].state}",))
        if not reasons:
            workspace.select(name, key)
        state, seconds = STALE if reasons else CURRENT, (workspace.manifest(name, key) or {}).get("seconds")
        size = workspace.size(name, key)
        found[name] = StageStatus(name, state, _made(workspace, name, key), seconds, size, reasons)
    return list(found.values())


def _results(workspace: Workspace, stage: str) -> list[str]:
    """The keys of what the stage has made: of the current result, then of the others, the latest first."""
    latest_first = sorted(workspace.keys(stage), key=lambda key: _made(workspace, stage, key), reverse=True)
    return sorted(latest_first, key=lambda key: key != workspace.current.get(stage))


def _made(workspace: Workspace, stage: str, key: str) -> str:
    manifest = workspace.manifest(stage, key) or {}
    if "made" in manifest:
        return manifest["made"]
    changed = workspace.result(stage, key)
    return _time(changed) if changed.exists() else ""


def _time(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")


def _kept(workspace: Workspace) -> list[KeptResults]:
    found: dict[str, KeptResults] = {}
    whole = [one for one in workspace.leftovers() if not one.key.endswith(".partial")]
    for leftover in whole:
        name = next((kind for kind in ("fit", "sweep") if leftover.stage.startswith(f"{kind}-")), leftover.stage)
        before = found.get(name, KeptResults(name, 0, 0))
        found[name] = KeptResults(name, before.results + 1, before.bytes + leftover.bytes)
    return list(found.values())


def _target(path: Path) -> dict[str, Any]:
    results = read_json(path) or {}
    return {"place": results.get("place"), "cpu": results.get("device", {}).get("cpu"), "measured": _time(path)}


def _sweep(result: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if result is None:
        return None
    return {name: list(dict.fromkeys(row[name] for row in result["rows"])) for name in ("method", "ratio")}


def _notes(workspace: Workspace, config: RunConfig, staleness: Staleness) -> list[str]:
    notes = []
    for words, place in (("model", config.model), ("adapter", config.adapter), ("data", config.data.data)):
        if place is not None and Path(place).is_absolute() and not Path(place).exists():
            notes.append(f"the {words} is gone: {place}; what is here stays, but nothing can be made anew")
    for what, words in (("gone", "is gone"), ("touched", "was written since it was last read; a run will read it")):
        for path in [path for path, found in staleness.files.items() if found == what and path.parent.exists()]:
            notes.append(f"{path} {words}")
    for pattern in UNFINISHED:
        for path in workspace.root.glob(pattern):
            place = path.relative_to(workspace.root).as_posix()
            notes.append(f"{place} is unfinished: a command is at work here, or was killed")
    return notes
