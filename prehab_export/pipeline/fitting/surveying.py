"""The first visit to the target: the survey, made once for all budgets, and what the search knows by it."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from converters.errors import InputError
from converters.onnx.graph_facts import read_graph
from prehab_export.compression import RankPlan, ranks_by
from prehab_export.pipeline.checks import bench_config
from prehab_export.pipeline.fitting.models import FitModels, slug_of
from prehab_export.pipeline.fitting.request import FitRequest
from prehab_export.pipeline.fitting.search import FLOAT32, Knowledge, Line, Search, Setup
from prehab_export.pipeline.fitting.survey import Anchor, LayerGraph, understood, write_layer_graphs
from prehab_export.pipeline.fitting.target import measure_layers, measure_models, visit_facts
from prehab_export.pipeline.latency_budget import layer_shapes, tokens_per_request
from prehab_export.system import bar, say, write_json

# Shares of the selected parameters that the anchors lack.
ANCHORS = (0.5, 0.85)

Row = dict[str, Any]


@dataclass(frozen=True)
class Survey:
    """rows: what the target told. search: among the models whose figures it foretells. drops: predicted loss → the
    metric's drop."""

    rows: list[Row]
    search: Search
    drops: Line


def survey_target(models: FitModels, request: FitRequest) -> Survey:
    """Ask the target, or look up what it told before, and judge the anchors.

    Raises:
        InputError: memory is limited, and the target does not tell how much a model takes.
    """
    plans, tokens = _anchor_plans(models), tokens_per_request(models.session)
    anchors = [_anchor(models, plan, mode) for plan, mode in plans]
    options = {
        **visit_facts(request.target, bench_config(models.session)),
        "threads": list(request.threads),
        "tokens": tokens,
        "anchors": [anchor.slug for anchor in anchors],
    }
    parents = [models.graph_identity(plan, mode) for plan, mode in plans]
    visit = partial(_visit, models, request, anchors, tokens)
    folder = models.published.result("fit-survey", options, parents, visit)
    told = json.loads((folder / "survey.json").read_text(encoding="utf-8"))
    graphs = [LayerGraph(**row | {"shape": tuple(row["shape"]), "path": Path()}) for row in told["layers"]]
    known = understood(told["rows"], models.layers, graphs, anchors, _penalties(models), tokens)
    _check_tells_memory(known, request)
    cuts = [plan for plan, mode in plans if mode == FLOAT32]
    drops = Line.through((models.layers.loss(plan.ranks, plan.shared), models.drop(plan, FLOAT32)) for plan in cuts)
    return Survey(told["rows"], Search(models.layers, known), drops)


def _anchor_plans(models: FitModels) -> list[tuple[RankPlan, str]]:
    """The dense model and a few cut ones, in every mode."""
    session, layers = models.session, models.layers
    losses = (dict(layers.losses), dict(layers.joint))
    cuts = [ranks_by(layers.shapes, losses, replace(session.config.cut, ratio=removed)) for removed in ANCHORS]
    return [(plan, mode) for plan in (models.dense, *cuts) for mode in models.modes]


def _anchor(models: FitModels, plan: RankPlan, mode: str) -> Anchor:
    graph = models.graph(plan, mode)
    units = models.layers.units(plan.ranks, plan.shared)
    return Anchor(f"{slug_of(plan)}-{mode}", mode, units, read_graph(graph).file_bytes / 1e6, graph)


def _visit(models: FitModels, request: FitRequest, anchors: Sequence[Anchor], tokens: int, folder: Path) -> None:
    """Layers and anchors, measured at the target; leaves ``survey.json``."""
    say(f"survey {request.target.name}", style="bold")
    graphs = write_layer_graphs(layer_shapes(models.session), tokens, models.modes, folder / "layers", bar)
    rows = measure_layers(graphs, tokens, request.threads, request.target, folder / "kits", bar)
    shutil.rmtree(folder / "layers")
    whole, config = {anchor.slug: anchor.graph for anchor in anchors}, bench_config(models.session)
    say(f"  time {len(whole)} models")
    rows += measure_models(whole, config, request.threads, request.target, folder / "kits", bar)["rows"]
    asked = [{key: value for key, value in asdict(graph).items() if key != "path"} for graph in graphs]
    write_json(folder / "survey.json", {"layers": asked, "rows": rows})


def _penalties(models: FitModels) -> dict[str, float]:
    """What each mode costs the dense model, in nats."""
    losses = {mode: models.metrics(models.dense, mode, "held-out").loss for mode in models.modes}
    return {mode: loss - losses[FLOAT32] for mode, loss in losses.items()}


def _check_tells_memory(known: dict[Setup, Knowledge], request: FitRequest) -> None:
    if request.budget.memory_mb is not None and any(row.memory is None for row in known.values()):
        raise InputError(f"{request.target.name} does not tell how much memory a model takes; leave out --memory")
