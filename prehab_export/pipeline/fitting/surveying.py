"""The first visit to the target: the survey, which serves every budget, and the search that is based on it."""

import json
import shutil
from collections.abc import Mapping, Sequence
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
from prehab_export.pipeline.fitting.search import FLOAT32, CostModel, Line, Search, Setup
from prehab_export.pipeline.fitting.survey import Anchor, LayerGraph, fit_cost_models, write_layer_graphs
from prehab_export.pipeline.fitting.target import measure_layers, measure_models, visit_facts
from prehab_export.pipeline.latency_budget import layer_shapes, tokens_per_request
from prehab_export.system import bar, say, write_json

# Removed shares of the selected parameters in the factored anchors.
ANCHOR_RATIOS = (0.5, 0.85)

Row = dict[str, Any]


@dataclass(frozen=True)
class Survey:
    """The result of a survey.

    rows: the target's measurements.
    search: the search, with a cost model for each setup.
    drops: maps a predicted loss, in nats, to the drop of the metric.
    """

    rows: list[Row]
    search: Search
    drops: Line


def survey_target(models: FitModels, request: FitRequest) -> Survey:
    """Measure the layers and the anchors at the target, and evaluate the anchors' accuracy.

    Measurements from an earlier fit are reused.

    Raises:
        InputError: the budget limits memory, but the target does not report the memory of a model.
    """
    plans, tokens = _anchor_plans(models), tokens_per_request(models.session)
    anchors = [_make_anchor(models, plan, mode) for plan, mode in plans]
    options = {
        **visit_facts(request.target, bench_config(models.session)),
        "threads": list(request.threads),
        "tokens": tokens,
        "anchors": [anchor.slug for anchor in anchors],
    }
    parents = [models.graph_identity(plan, mode) for plan, mode in plans]
    measure = partial(_measure_survey, models, request, anchors, tokens)
    folder = models.cache.get_or_compute("fit-survey", options, parents, measure)
    results = json.loads((folder / "survey.json").read_text(encoding="utf-8"))
    graphs = [LayerGraph(**row | {"shape": tuple(row["shape"]), "path": Path()}) for row in results["layers"]]
    cost_models = fit_cost_models(results["rows"], graphs, anchors, _measure_penalties(models), tokens)
    _check_memory_reported(cost_models, request)
    float_plans = [plan for plan, mode in plans if mode == FLOAT32]
    drops = Line.through(
        (models.layers.loss(plan.ranks, plan.shared), models.drop(plan, FLOAT32)) for plan in float_plans
    )
    return Survey(results["rows"], Search(models.layers, cost_models), drops)


def _anchor_plans(models: FitModels) -> list[tuple[RankPlan, str]]:
    """Return the plan of each anchor with its mode: the dense model and a few factored ones, in every mode."""
    session, layers = models.session, models.layers
    losses = (dict(layers.losses), dict(layers.joint_losses))
    factored = [ranks_by(layers.shapes, losses, replace(session.config.cut, ratio=ratio)) for ratio in ANCHOR_RATIOS]
    return [(plan, mode) for plan in (models.dense, *factored) for mode in models.modes]


def _make_anchor(models: FitModels, plan: RankPlan, mode: str) -> Anchor:
    graph = models.graph(plan, mode)
    units = models.layers.units(plan.ranks, plan.shared)
    return Anchor(f"{slug_of(plan)}-{mode}", mode, units, read_graph(graph).file_bytes / 1e6, graph)


def _measure_survey(
    models: FitModels, request: FitRequest, anchors: Sequence[Anchor], tokens: int, folder: Path
) -> None:
    """Measure the layers and the anchors at the target, and write ``survey.json``."""
    say(f"survey {request.target.name}", style="bold")
    layer_graphs = write_layer_graphs(layer_shapes(models.session), tokens, models.modes, folder / "layers", bar)
    rows = measure_layers(layer_graphs, tokens, request.threads, request.target, folder / "kits", bar)
    shutil.rmtree(folder / "layers")
    graphs, config = {anchor.slug: anchor.graph for anchor in anchors}, bench_config(models.session)
    say(f"  time {len(graphs)} models")
    rows += measure_models(graphs, config, request.threads, request.target, folder / "kits", bar)["rows"]
    layers = [{key: value for key, value in asdict(graph).items() if key != "path"} for graph in layer_graphs]
    write_json(folder / "survey.json", {"layers": layers, "rows": rows})


def _measure_penalties(models: FitModels) -> dict[str, float]:
    """Return the loss that each mode adds to the dense model, in nats."""
    losses = {mode: models.metrics(models.dense, mode, "held-out").loss for mode in models.modes}
    return {mode: loss - losses[FLOAT32] for mode, loss in losses.items()}


def _check_memory_reported(cost_models: Mapping[Setup, CostModel], request: FitRequest) -> None:
    if request.budget.memory_mb is not None and any(model.memory is None for model in cost_models.values()):
        raise InputError(f"{request.target.name} does not report how much memory a model takes; leave out --memory")
