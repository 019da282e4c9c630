"""The second visit to the target: it measures the finalists together with the dense model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.onnx.graph_facts import read_graph
from prehab_export.compression import RankPlan
from prehab_export.config import Figures
from prehab_export.pipeline.checks import bench_config
from prehab_export.pipeline.fitting.models import FitModels, slug_of
from prehab_export.pipeline.fitting.request import FitRequest
from prehab_export.pipeline.fitting.search import FLOAT32, Candidate
from prehab_export.pipeline.fitting.target import measure_models, visit_facts
from prehab_export.system import bar, say, write_json

# Largest ratio between the dense model's p95 in the survey and in the finals that counts as stable.
MAX_DRIFT = 1.3

Row = dict[str, Any]


@dataclass(frozen=True)
class Finals:
    """The measurements of the finalists.

    device: the target's description of itself.
    rows: the target's measurements.
    measurements: each finalist with its measured figures.
    """

    device: Row
    rows: list[Row]
    measurements: list[tuple[Candidate, Figures]]

    def merge(self, other: "Finals") -> "Finals":
        return Finals(self.device, [*self.rows, *other.rows], [*self.measurements, *other.measurements])


def measure_finalists(models: FitModels, request: FitRequest, candidates: Sequence[Candidate]) -> Finals:
    """Make the candidates' models, measure them at the target and evaluate their accuracy.

    Measurements from an earlier fit are reused.
    """
    plans = {_slug(candidate): (plan_of(candidate), candidate.setup.mode) for candidate in candidates}
    plans = {f"dense-{FLOAT32}": (models.dense, FLOAT32)} | plans
    graphs = {slug: models.graph(plan, mode) for slug, (plan, mode) in plans.items()}
    parents = [models.graph_identity(plan, mode) for plan, mode in plans.values()]
    threads, config = sorted({candidate.setup.threads for candidate in candidates}), bench_config(models.session)

    def measure(folder: Path) -> None:
        say(f"measure {len(candidates)} finalists on {request.target.name}", style="bold")
        say(f"  time {len(graphs)} models")
        results = measure_models(graphs, config, threads, request.target, folder / "kits", bar)
        write_json(folder / "results.json", results)

    options = {**visit_facts(request.target, config), "threads": threads, "models": list(graphs)}
    folder = models.cache.get_or_compute("fit-finalists", options, parents, measure)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    measurements = [(candidate, _read_figures(models, candidate, results["rows"])) for candidate in candidates]
    return Finals(results["device"], results["rows"], measurements)


def _read_figures(models: FitModels, candidate: Candidate, rows: Sequence[Row]) -> Figures:
    key = (_slug(candidate), candidate.setup.threads)
    row = next(row for row in rows if (row["model"], row["threads"]) == key)
    plan, mode = plan_of(candidate), candidate.setup.mode
    return Figures(
        p50_ms=row["p50_ms"],
        p95_ms=row["p95_ms"],
        memory_mb=row.get("peak_mb"),
        size_mb=read_graph(models.graph(plan, mode)).file_bytes / 1e6,
        drop=models.drop(plan, mode),
    )


def stability_warning(survey: Sequence[Row], finals: Sequence[Row]) -> str | None:
    """Return a warning if the dense model's p95 differs much between the survey and the finals, else None."""
    survey_p95, finals_p95 = (
        {row["threads"]: row["p95_ms"] for row in rows if row["model"] == f"dense-{FLOAT32}"}
        for rows in (survey, finals)
    )
    for threads, after in finals_p95.items():
        before = survey_p95[threads]
        if not 1 / MAX_DRIFT < after / before < MAX_DRIFT:
            return (
                f"The device's speed was not stable: the dense model's p95 was {before:.2f} ms in the survey and "
                f"{after:.2f} ms with the finalists. Run the fit again when the device is idle."
            )
    return None


def plan_of(candidate: Candidate) -> RankPlan:
    return RankPlan(candidate.ranks, candidate.shared)


def _slug(candidate: Candidate) -> str:
    return f"{slug_of(plan_of(candidate))}-{candidate.setup.mode}"
