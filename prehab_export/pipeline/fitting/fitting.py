"""The fit: the most accurate model within a budget on the device where it will run, or the proof that none was found.

The target is used twice: once for the survey (``survey``), from which everything is predicted (``search``), and once
to measure the finalists. Whatever takes long is published by itself, so that a fit that was killed, or is asked again
with another budget, computes only what is missing.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from converters.errors import InputError
from converters.onnx.graph_facts import read_graph
from prehab_export.compression import Plan, ranks_by
from prehab_export.config import PARAMETERS, Budget, Figures, RunConfig
from prehab_export.inputs import Metrics
from prehab_export.pipeline.checks import bench_config
from prehab_export.pipeline.fitting.models import FitModels, slug_of
from prehab_export.pipeline.fitting.report import write_fit
from prehab_export.pipeline.fitting.search import (
    FLOAT32,
    Candidate,
    Line,
    Search,
    chosen,
    corrected,
    distinct,
    finalists,
    pareto,
)
from prehab_export.pipeline.fitting.survey import Anchor, LayerGraph, understood, write_layer_graphs
from prehab_export.pipeline.fitting.target import check_target, measure_layers, measure_models, place_of
from prehab_export.pipeline.latency_budget import layer_shapes, tokens_at_a_time
from prehab_export.pipeline.running import bring_up, opened_beside
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.target_bench import Target
from prehab_export.system import BudgetError, bar, say, write_json

# Shares of the targeted parameters that the anchors lack.
ANCHORS = (0.5, 0.85)
FINALISTS = 3
# By how much the dense model's p95 may differ between the two visits to the target.
STEADY = 1.3

Row = dict[str, Any]


@dataclass(frozen=True)
class FitRequest:
    """target: where to measure. threads: the numbers of threads that may be used there."""

    budget: Budget
    target: Target = field(default_factory=lambda: Target("local"))
    threads: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if not self.threads or min(self.threads) < 1:
            raise InputError(f"--threads must be 1 or more, not {' '.join(map(str, self.threads)) or 'nothing'}")


def fit(config: RunConfig, output: Path, request: FitRequest) -> Path:
    """Find the most accurate model within the budget; returns the folder with table, plot and model.

    Args:
        config: the model, data and calibration; ``quantize`` are the kinds of quantisation that may be used.

    Raises:
        InputError: bad input or a target that cannot be reached, found before anything slow.
        BudgetError: nothing was found within the budget; the folder holds the figures.
    """
    given, cut = config, replace(config.truncate, budget=PARAMETERS, objective="fisher", allocation="loss")
    config = replace(config, truncate=cut)
    check_target(request.target, request.threads)
    with opened_beside(config, output, given, ["baseline"]) as session:
        session.workspace.hide("fit")  # of another budget perhaps: it must not stand there as this one's
        names = ["merge"] if config.adapter is not None else []
        bring_up(session, [*names, "calibrate", "baseline"])
        work = _Fit(session, request)
        result, best = work.run()
        with session.workspace.show("fit") as folder:
            write_fit(result, folder)
            if best is not None:
                work.models.write_folder(_plan(best), best.setup.mode, folder / "model")
                for name, copy in (("fit.md", "README.md"), ("fit.png", "fit.png")):
                    shutil.copy2(folder / name, folder / "model" / copy)
    if best is None:
        raise BudgetError(f"{result['verdict']} Every figure is in {output / 'fit'}")
    return output / "fit"


class _Fit:
    """One fit: what the target tells, the search, and the finalists."""

    def __init__(self, session: Session, request: FitRequest) -> None:
        self.session, self.request = session, request
        self.models = FitModels(session)
        self.layers, self.dense = self.models.layers, self.models.dense
        self.modes = (FLOAT32, *dict.fromkeys(session.config.quantize))

    def _anchors(self) -> list[tuple[Plan, str]]:
        """The dense model and a few cut ones, in every mode."""
        session, layers = self.session, self.layers
        linears, losses = session.layers(session.empty_model), (dict(layers.losses), dict(layers.joint))
        cuts = [ranks_by(linears, losses, replace(session.config.cut, ratio=removed)) for removed in ANCHORS]
        return [(plan, mode) for plan in (self.dense, *cuts) for mode in self.modes]

    def _search(self) -> tuple[Search, Line, list[Row]]:
        """What is known of the target, and the line from predicted loss to the metric's drop."""
        plans, tokens = self._anchors(), tokens_at_a_time(self.session)
        anchors = [self._anchor(plan, mode) for plan, mode in plans]
        options = {
            **self._place(),
            "threads": list(self.request.threads),
            "tokens": tokens,
            "anchors": [anchor.slug for anchor in anchors],
        }
        parents = [self.models.graph_identity(plan, mode) for plan, mode in plans]
        folder = self.models.stage("fit-survey", options, parents, partial(self._survey, anchors, tokens))
        told = json.loads((folder / "survey.json").read_text(encoding="utf-8"))
        graphs = [LayerGraph(**row | {"shape": tuple(row["shape"]), "path": Path()}) for row in told["layers"]]
        reference = self.models.metrics(self.dense, FLOAT32, "held-out").loss
        penalties = {mode: self.models.metrics(self.dense, mode, "held-out").loss - reference for mode in self.modes}
        known = understood(told["rows"], self.layers, graphs, anchors, penalties, tokens)
        if self.request.budget.memory_mb is not None and any(row.memory is None for row in known.values()):
            raise InputError(
                f"{self.request.target.name} does not tell how much memory a model takes; leave out --memory"
            )
        float_plans = [plan for plan, mode in plans if mode == FLOAT32]
        drops = Line.through(
            (self.layers.loss(plan.ranks, plan.shared), self.models.drop(plan, FLOAT32)) for plan in float_plans
        )
        return Search(self.layers, known), drops, told["rows"]

    def _anchor(self, plan: Plan, mode: str) -> Anchor:
        graph = self.models.graph(plan, mode)
        units = self.layers.units(plan.ranks, plan.shared)
        return Anchor(f"{slug_of(plan)}-{mode}", mode, units, read_graph(graph).file_bytes / 1e6, graph)

    def _survey(self, anchors: Sequence[Anchor], tokens: int, folder: Path) -> None:
        say(f"survey {self.request.target.name}", style="bold")
        shapes = layer_shapes(self.session)
        graphs = write_layer_graphs(shapes, tokens, self.modes, folder / "layers", bar)
        rows = measure_layers(graphs, tokens, self.request.threads, self.request.target, folder / "kits", bar)
        models = {anchor.slug: anchor.graph for anchor in anchors}
        rows += self._measure(models, self.request.threads, folder)["rows"]
        shutil.rmtree(folder / "layers")
        asked = [{k: v for k, v in asdict(graph).items() if k != "path"} for graph in graphs]
        write_json(folder / "survey.json", {"layers": asked, "rows": rows})

    def _place(self) -> Row:
        """What a measurement depends on besides the models."""
        return {**place_of(self.request.target), "bench": asdict(bench_config(self.session))}

    def _measure(self, models: Mapping[str, Path], threads: Sequence[int], folder: Path) -> Row:
        say(f"  time {len(models)} models")
        config = bench_config(self.session)
        results = measure_models(models, config, threads, self.request.target, folder / "kits", bar)
        shutil.rmtree(folder / "kits", ignore_errors=True)
        return results

    def run(self) -> tuple[Row, Candidate | None]:
        """The result as JSON types, and the candidate that is recommended; None where none keeps to the budget."""
        budget = self.request.budget
        search, drops, surveyed = self._search()
        candidates = search.all(budget, bar)
        few = finalists(candidates, budget, FINALISTS)
        final, tried = self._tried(few)
        best = chosen(tried, budget)
        within = not budget.misses(few[0].predicted)
        if best is None and within and all(budget.distance(replace(own, drop=None)) for _, own in tried):
            # What was predicted to fit does not: predictions were low, and now it is known by how much.
            nearer = corrected(budget, tried)
            more = [c for c in search.all(nearer, bar) if not nearer.misses(c.predicted)]
            if more:
                few = finalists(more, nearer, FINALISTS)
                again, further = self._tried(few)
                candidates, tried = distinct([*candidates, *few]), [*tried, *further]
                final = final | {"rows": [*final["rows"], *again["rows"]]}
                best = chosen(tried, budget)
        figures = {c.key: own for c, own in tried}
        unbeaten_rows = pareto([(c.loss, c.predicted.p95_ms, c.predicted.size_mb) for c in candidates])
        rows = [
            candidate.facts()
            | {
                "predicted_drop": drops.at(candidate.loss),
                "pareto": unbeaten,
                "fits_by_prediction": not budget.misses(candidate.predicted),
                "measured": asdict(figures[candidate.key]) if candidate.key in figures else None,
                "recommended": best is not None and candidate.key == best.key,
            }
            for candidate, unbeaten in zip(candidates, unbeaten_rows, strict=True)
        ]
        dense = self.models.metrics(self.dense, FLOAT32)
        near, own = min(tried, key=lambda pair: budget.distance(pair[1]))
        verdict = _nearest(near, own, budget) if best is None else _verdict(best, figures[best.key], dense)
        result = {
            "model": Path(self.session.config.model).name,
            "task": self.session.config.task,
            "target": self.request.target.name.partition(":")[0],
            "device": final["device"],
            "budget": asdict(budget),
            "metric": asdict(dense),
            "coverage": self.session.coverage.facts(),
            "verdict": verdict,
            "warning": unsteady(surveyed, final["rows"]),
            "candidates": rows,
            "measured": {"survey": surveyed, "finalists": final["rows"]},
        }
        return result, best

    def _tried(self, candidates: Sequence[Candidate]) -> tuple[Row, list[tuple[Candidate, Figures]]]:
        """What the target answered, and each candidate's figures."""
        final = self._finals(candidates)
        return final, [(candidate, self._figures(candidate, final["rows"])) for candidate in candidates]

    def _finals(self, candidates: Sequence[Candidate]) -> Row:
        """The finalists for real, beside the dense model."""
        models = {f"dense-{FLOAT32}": self.models.graph(self.dense, FLOAT32)}
        models |= {_slug(c): self.models.graph(_plan(c), c.setup.mode) for c in candidates}
        parents = [self.models.graph_identity(self.dense, FLOAT32)]
        parents += [self.models.graph_identity(_plan(c), c.setup.mode) for c in candidates]
        threads = sorted({c.setup.threads for c in candidates})
        options = {**self._place(), "threads": threads, "models": list(models)}

        def work(folder: Path) -> None:
            say(f"measure {len(candidates)} finalists on {self.request.target.name}", style="bold")
            write_json(folder / "results.json", self._measure(models, threads, folder))

        return json.loads(
            (self.models.stage("fit-finalists", options, parents, work) / "results.json").read_text(encoding="utf-8")
        )

    def _figures(self, candidate: Candidate, results: Sequence[Row]) -> Figures:
        wanted = (_slug(candidate), candidate.setup.threads)
        row = next(row for row in results if (row["model"], row["threads"]) == wanted)
        graph = self.models.graph(_plan(candidate), candidate.setup.mode)
        return Figures(
            p50_ms=row["p50_ms"],
            p95_ms=row["p95_ms"],
            memory_mb=row.get("peak_mb"),
            size_mb=read_graph(graph).file_bytes / 1e6,
            drop=self.models.drop(_plan(candidate), candidate.setup.mode),
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


def _plan(candidate: Candidate) -> Plan:
    return Plan(candidate.ranks, candidate.shared)


def _slug(candidate: Candidate) -> str:
    return f"{slug_of(_plan(candidate))}-{candidate.setup.mode}"


def _verdict(best: Candidate, own: Figures, dense: Metrics) -> str:
    assert own.drop is not None
    start = "The dense model is within the budget: nothing needs to be cut. " if best.is_dense else ""
    unit = "points of accuracy" if dense.metric == "accuracy" else "% of perplexity"
    memory = "" if own.memory_mb is None else f", {own.memory_mb:.0f} MB of memory"
    off = best.predicted.p50_ms / own.p50_ms - 1
    return (
        f"{start}Take {best.name}: {100 * own.drop:.2f} {unit} lost, p95 {own.p95_ms:.2f} ms, file {own.size_mb:.1f} MB"
        f"{memory}. Its p50 was predicted as {best.predicted.p50_ms:.2f} ms, {off:+.1%} off."
    )


def _nearest(near: Candidate, own: Figures, budget: Budget) -> str:
    over = "; ".join(f"{m.limit} {m.found:.4g} where {m.allowed:.4g} is allowed" for m in budget.misses(own))
    return f"No model was found within the budget. The nearest is {near.name}: {over}."
