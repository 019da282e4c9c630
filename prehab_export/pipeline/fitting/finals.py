"""The second visit to the target: the finalists for real, beside the dense model."""

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

# By how much the dense model's p95 may differ between the two visits to the target.
STEADY = 1.3

Row = dict[str, Any]


@dataclass(frozen=True)
class Finals:
    """device: what the target says of itself. rows: what it told. tried: each finalist with its figures."""

    device: Row
    rows: list[Row]
    tried: list[tuple[Candidate, Figures]]

    def joined(self, further: "Finals") -> "Finals":
        return Finals(self.device, [*self.rows, *further.rows], [*self.tried, *further.tried])


def measure_finalists(models: FitModels, request: FitRequest, candidates: Sequence[Candidate]) -> Finals:
    """Make the candidates' models, measure them at the target, or look it up, and judge them."""
    plans = {_slug(candidate): (plan_of(candidate), candidate.setup.mode) for candidate in candidates}
    plans = {f"dense-{FLOAT32}": (models.dense, FLOAT32)} | plans
    graphs = {slug: models.graph(plan, mode) for slug, (plan, mode) in plans.items()}
    parents = [models.graph_identity(plan, mode) for plan, mode in plans.values()]
    threads, config = sorted({candidate.setup.threads for candidate in candidates}), bench_config(models.session)

    def visit(folder: Path) -> None:
        say(f"measure {len(candidates)} finalists on {request.target.name}", style="bold")
        say(f"  time {len(graphs)} models")
        results = measure_models(graphs, config, threads, request.target, folder / "kits", bar)
        write_json(folder / "results.json", results)

    options = {**visit_facts(request.target, config), "threads": threads, "models": list(graphs)}
    folder = models.published.result("fit-finalists", options, parents, visit)
    told = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    tried = [(candidate, _figures(models, candidate, told["rows"])) for candidate in candidates]
    return Finals(told["device"], told["rows"], tried)


def _figures(models: FitModels, candidate: Candidate, rows: Sequence[Row]) -> Figures:
    wanted = (_slug(candidate), candidate.setup.threads)
    row = next(row for row in rows if (row["model"], row["threads"]) == wanted)
    plan, mode = plan_of(candidate), candidate.setup.mode
    return Figures(
        p50_ms=row["p50_ms"],
        p95_ms=row["p95_ms"],
        memory_mb=row.get("peak_mb"),
        size_mb=read_graph(models.graph(plan, mode)).file_bytes / 1e6,
        drop=models.drop(plan, mode),
    )


def unsteady(survey: Sequence[Row], finals: Sequence[Row]) -> str | None:
    """A warning where the dense model, measured both times, was far faster or slower the second time."""
    before, after = (
        {row["threads"]: row["p95_ms"] for row in rows if row["model"] == f"dense-{FLOAT32}"}
        for rows in (survey, finals)
    )
    off = [(before[count], after[count]) for count in after if not 1 / STEADY < after[count] / before[count] < STEADY]
    if not off:
        return None
    (then, now), *_ = off
    return (
        f"The device was not steady: the dense model's p95 was {then:.2f} ms in the survey and {now:.2f} ms beside the "
        "finalists. Ask again when it has nothing else to do."
    )


def plan_of(candidate: Candidate) -> RankPlan:
    return RankPlan(candidate.ranks, candidate.shared)


def _slug(candidate: Candidate) -> str:
    return f"{slug_of(plan_of(candidate))}-{candidate.setup.mode}"
