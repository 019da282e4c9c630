"""The fit: the search keeps to the budget and finds what brute force finds; the command measures, chooses, resumes."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from progress_record import ProgressRecord

from converters.errors import InputError
from converters.folder import from_pretrained
from converters.lowrank import LowRankLinear
from converters.onnx.graph_facts import read_graph
from converters.onnx.runtime import open_session
from prehab_export.cli.commands import cli
from prehab_export.cli.entry import main
from prehab_export.config.bench import BenchConfig
from prehab_export.config.budget import Budget, Figures, drop_of
from prehab_export.config.calibrate import CalibrateConfig
from prehab_export.config.data import DataConfig
from prehab_export.config.run import RunConfig
from prehab_export.config.target import Target
from prehab_export.config.truncate import TruncateConfig
from prehab_export.linalg.allocation import break_even, parameters
from prehab_export.pipeline.fitting import finals, surveying
from prehab_export.pipeline.fitting.finals import stability_warning
from prehab_export.pipeline.fitting.fitting import fit
from prehab_export.pipeline.fitting.request import FitRequest
from prehab_export.pipeline.fitting.search import (
    FLOAT32,
    Candidate,
    CostModel,
    Layers,
    Line,
    Search,
    Setup,
    correct_limits,
    pareto_mask,
    select_best,
    select_finalists,
    tighten,
)
from prehab_export.pipeline.fitting.survey import Anchor, LayerGraph, fit_cost_models, survey_ranks, write_layer_graphs
from prehab_export.pipeline.fitting.target import identify_target, measure_layers, measure_models
from prehab_export.system.errors import BudgetError
from prehab_export.system.machine import machine_facts

SHAPES = {"a": (24, 24), "b": (48, 24), "c": (24, 48)}


def losses_of(size, seed):
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.rand(size, generator=generator).double() * 0.6 ** torch.arange(size)
    tail = spectrum.sort(descending=True).values.flip(0).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(1)])


def layers_of(seed, multiple=4):
    losses = {name: losses_of(min(shape), seed + at) for at, (name, shape) in enumerate(SHAPES.items())}
    return Layers(SHAPES, losses, {}, multiple, floor_share=0.0)


def slow_when_narrow(m, n, rank):
    """Seconds: a product costs a start as well as its multiplications, so thin factors pay less than they save."""
    return 1e-6 * (m * n) + 2e-4 if rank is None else 1e-6 * rank * (m + n) + 3e-4


def knowledge(layers, mode=FLOAT32, speed=1.0, penalty=0.0, bytes_each=4.0):
    def cost(m, n, rank):
        return slow_when_narrow(m, n, rank) / speed

    dense = layers.dense_cost(cost)
    numbers = layers.parameters
    return CostModel(
        Setup(mode, 1),
        cost,
        latency=Line.through([(dense / 2, 1 + 500 * dense), (dense, 1 + 1000 * dense)]),
        tail_ratio=1.25,
        size=Line.through([(0.0, 0.01), (numbers, 0.01 + numbers * bytes_each / 1e6)]),
        memory=Line.through([(0.0, 30.0), (numbers, 30 + 2 * numbers * bytes_each / 1e6)]),
        penalty=penalty,
    )


def search_of(seed=0, multiple=4):
    layers = layers_of(seed, multiple)
    rows = [knowledge(layers), knowledge(layers, "int8", speed=2.0, penalty=0.3, bytes_each=1.0)]
    return Search(layers, {row.setup: row for row in rows})


def everything(search, known):
    """Every combination of ranks, with its prediction."""
    menus = [[None, *range(4, m * n // (m + n) + 1, 4)] for m, n in SHAPES.values()]
    for ranks in itertools.product(*menus):
        chosen = dict(zip(SHAPES, ranks, strict=True))
        loss = sum(float(search.layers.losses[name][r]) for name, r in chosen.items() if r is not None)
        yield search.predict(known, chosen, (), loss)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 500), time=st.floats(0.55, 1.0), size=st.floats(0.3, 1.0), mode=st.sampled_from([0, 1]))
def test_the_search_keeps_to_the_budget_and_is_near_the_best_there_is(seed, time, size, mode):
    search = search_of(seed)
    known = list(search.cost_models.values())[mode]
    dense = search.predict(known, dict.fromkeys(SHAPES))
    budget = Budget(p95_ms=dense.predicted.p95_ms * time, size_mb=dense.predicted.size_mb * size)
    found = search.best_within(known, budget)
    possible = list(everything(search, known))
    within = [c for c in possible if not budget.misses(c.predicted)]
    if not within:
        assert budget.misses(found.predicted)
        return
    best = min(c.loss for c in within)
    # A walk along convex hulls is a step away from the best at most: what it finds beats all that is a little cheaper.
    cheaper = [c.loss for c in possible if not tighten(budget, 0.25).misses(c.predicted)]
    assert not budget.misses(found.predicted) or not cheaper
    if not budget.misses(found.predicted):
        assert found.loss >= best - 1e-9
        assert found.loss <= min(cheaper, default=torch.inf) + 1e-9


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=5), st.floats(0, 12))
def test_a_line_is_rising_and_its_inverse_is_the_last_place_within(points, y):
    line = Line.through(points)
    places = [at / 7 for at in range(71)]
    values = [line.at(x) for x in places]
    inside = [value for x, value in zip(places, values, strict=True) if x >= line.points[0][0]]
    assert inside == sorted(inside)
    most = line.largest_x(y, 10.0)
    assert 0 <= most <= 10
    if most > 1e-6:
        assert line.at(most) <= y + 1e-6


def test_a_line_passes_through_its_points():
    line = Line.through([(1, 10), (3, 20), (4, 40)])
    assert [line.at(x) for x in (0, 1, 2, 3, 3.5, 4, 5)] == [5, 10, 15, 20, 30, 40, 60]
    assert line.largest_x(30, 4) == pytest.approx(3.5)


def test_dense_is_the_answer_where_it_fits_and_a_penalty_counts():
    search = search_of()
    full, small = search.dense_candidates
    assert (full.loss, small.loss) == (0.0, 0.3)
    loose = Budget(p95_ms=2 * full.predicted.p95_ms)
    assert select_finalists(search.candidates(loose), loose)[0] == full
    # Too slow in float32; int8 is fast enough dense, but costs more than cutting a little.
    close = Budget(p95_ms=0.97 * full.predicted.p95_ms)
    best = select_finalists(search.candidates(close), close)[0]
    assert best.setup.mode == FLOAT32
    assert not best.is_dense
    assert 0 < best.loss < 0.3
    # Far too slow in float32: int8 remains.
    fast = Budget(p95_ms=0.6 * full.predicted.p95_ms)
    assert select_finalists(search.candidates(fast), fast)[0].setup.mode == "int8"


def test_different_budgets_give_different_models_and_looser_ones_lose_less():
    search = search_of(3)
    dense = search.dense_candidates[0].predicted.p95_ms
    best = [
        select_finalists(search.candidates(b), b)[0]
        for b in (Budget(p95_ms=dense * share) for share in (0.45, 0.7, 0.9))
    ]
    assert len({str(c.facts()) for c in best}) == 3
    assert best[0].loss > best[1].loss > best[2].loss


def test_where_nothing_fits_the_nearest_come_first():
    search = search_of()
    budget = Budget(p95_ms=0.001)
    near = select_finalists(search.candidates(budget), budget)
    assert len(near) == 1
    least = min(c.predicted.p95_ms for c in search.candidates(budget))
    assert near[0].predicted.p95_ms == least
    (miss,) = budget.misses(near[0].predicted)
    assert miss.limit == "p95_ms"
    assert miss.over == pytest.approx(least / 0.001 - 1)
    close = Budget(p95_ms=0.9 * least)
    hopeful = select_finalists(search.candidates(close), close)
    assert len(hopeful) == 3
    distances = [close.distance(candidate.predicted) for candidate in hopeful]
    assert distances == sorted(distances)


def test_finalists_differ_and_one_is_well_inside():
    search = search_of(7)
    budget = Budget(p95_ms=0.75 * search.dense_candidates[0].predicted.p95_ms)
    tries = select_finalists(search.candidates(budget), budget)
    assert len(tries) == len({id(c) for c in tries}) == 3
    assert not any(budget.misses(c.predicted) for c in tries)
    assert any(not tighten(budget, 0.08).misses(c.predicted) for c in tries)
    assert len({c.setup for c in tries}) == 2
    assert tries[0].loss == min(c.loss for c in tries)


def test_a_memory_limit_binds_through_the_parameters():
    search = search_of(1)
    known = next(iter(search.cost_models.values()))
    full = search.predict(known, dict.fromkeys(SHAPES)).predicted.memory_mb
    least = known.memory.at(0.0)
    budget = Budget(memory_mb=least + 0.5 * (full - least))
    found = search.best_within(known, budget)
    assert found.predicted.memory_mb <= budget.memory_mb
    assert found.share_removed == pytest.approx(0.5, abs=0.08)


def test_shared_inputs_count_as_one_stack():
    layers = Layers({"q": (8, 8), "k": (8, 8), "o": (8, 8)}, {}, {}, 1)
    units = layers.units({"q": 2, "k": 2, "o": None}, (("q", "k"),))
    assert units == [(16, 8, 2), (8, 8, None)]
    assert layers.total_cost(parameters, {"q": 2, "k": 2, "o": None}, (("q", "k"),)) == 2 * 24 + 64


def test_facts_name_only_layers_that_are_cut():
    figures = Figures(1.0, 2.0, None, 3.0)
    candidate = Candidate(Setup("int8", 2), {"a": 4, "b": None}, (), 0.5, 0.1, figures)
    assert candidate.facts()["ranks"] == {"a": 4}
    assert candidate.name == "50.0% removed, int8, 2 threads"


def test_predictions_that_were_low_lower_the_limits():
    predicted = Figures(5.0, 8.0, 40.0, 2.0)
    candidate = Candidate(Setup(FLOAT32, 1), {"a": 4}, (), 0.5, 0.1, predicted)
    found = correct_limits(
        Budget(p95_ms=8.0, memory_mb=50.0, size_mb=None),
        [(candidate, Figures(5.0, 10.0, 30.0, 9.0)), (candidate, predicted)],
    )
    assert found == Budget(p95_ms=pytest.approx(6.4), memory_mb=50.0)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
def test_pareto_keeps_what_nothing_beats(rows):
    kept = [row for row, keep in zip(rows, pareto_mask(rows), strict=True) if keep]
    assert kept
    for row in rows:
        beaten = any(other[0] <= row[0] and other[1] <= row[1] and other != row for other in rows)
        assert (row in kept) != beaten


def test_limits_are_read_in_their_units():
    budget = Budget.parse(p95="0.02 s", memory="1GiB", size="500kB", max_drop="1%", metric="accuracy")
    assert budget.p95_ms == pytest.approx(20)
    assert budget.memory_mb == pytest.approx(1073.741824)
    assert budget.size_mb == pytest.approx(0.5)
    assert budget.max_drop == pytest.approx(0.01)
    assert Budget.parse(p95="5ms", memory=None, size=None, max_drop="0%", metric="accuracy").max_drop == 0


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"p95": "20"}, "unit"),
        ({"p95": "20 parsecs"}, "20 parsecs"),
        ({"p95": "-3ms"}, "--p95"),
        ({"p95": "0ms"}, "more than 0"),
        ({"memory": "12ms"}, "--memory"),
        ({"size": "1e999MB"}, "not a usable limit"),
        ({"p95": "1ms", "max_drop": "x%"}, "--max-drop"),
        ({"p95": "1ms", "max_drop": "1pt", "metric": "perplexity"}, "points are for accuracy"),
        ({"max_drop": "1%"}, "at least one limit"),
    ],
)
def test_limits_that_are_none_are_refused(words, match):
    with pytest.raises(InputError, match=match):
        Budget.parse(**{"p95": None, "memory": None, "size": None, "max_drop": None, "metric": "accuracy"} | words)


def test_a_device_that_changes_its_pace_is_told_of():
    def rows(*p95):
        return [{"model": "dense-float32", "threads": at + 1, "p95_ms": value} for at, value in enumerate(p95)]

    assert stability_warning(rows(2.0, 4.0), rows(2.2, 3.5)) is None
    assert "4.00 ms in the survey and 6.00 ms" in stability_warning(rows(2.0, 4.0), rows(2.0, 6.0))
    assert "4.00 ms in the survey and 2.00 ms" in stability_warning(rows(2.0, 4.0), rows(2.0, 2.0))


def test_a_drop_is_in_points_of_accuracy_and_relative_for_perplexity():
    assert drop_of("accuracy", 0.9, 0.87) == pytest.approx(0.03)
    assert drop_of("perplexity", 10.0, 11.0) == pytest.approx(0.1)
    assert Budget(max_drop=0.02).distance(Figures(1, 1, 1, 1, drop=0.03)) == pytest.approx(0.5)
    assert Budget(memory_mb=1.0).misses(Figures(1, 1, None, 1)) == []


def test_of_what_fits_the_most_accurate_is_chosen_and_dense_where_it_fits():
    def tried(drop, p95, ranks=4, mode="int8"):
        own = Figures(p95 / 2, p95, None, 1.0, drop=drop)
        return Candidate(Setup(mode, 1), {"a": ranks}, (), 0.5, 0.1, own), own

    budget = Budget(p95_ms=10, max_drop=0.02)
    accurate, fast, lossy, slow = tried(0.01, 9), tried(0.015, 5), tried(0.03, 2), tried(0.0, 11)
    assert select_best([lossy, fast, slow, accurate], budget) is accurate[0]
    assert select_best([lossy, fast, slow], budget) is fast[0]
    assert select_best([lossy, slow], budget) is None
    lucky, dense = tried(-0.01, 3), tried(0.0, 9, ranks=None, mode=FLOAT32)
    assert select_best([lucky, dense], budget) is dense[0]
    assert select_best([tried(0.01, 8), tried(0.01, 7)], budget).predicted.p95_ms == 7


def test_surveyed_ranks_reach_break_even_and_rise():
    for m, n in ((384, 384), (1536, 384), (20, 30), (5, 4)):
        ranks = survey_ranks(m, n)
        assert list(ranks) == sorted(set(ranks))
        assert ranks[-1] == break_even(m, n)


def test_what_was_measured_on_this_machine_holds_for_no_other():
    places = {name: identify_target(Target(name))["machine"] for name in ("local", "browser", "ssh://board")}
    assert places["local"] == places["browser"] == machine_facts()
    assert places["ssh://board"] is None


def test_layers_and_models_are_measured_by_kits(tmp_path):
    record, shapes = ProgressRecord(), [(24, 16), (24, 16), (16, 16)]
    graphs = write_layer_graphs(shapes, 5, (FLOAT32, "int8"), tmp_path / "layers", record)
    assert {p.copies for p in graphs if p.shape == (24, 16)} == {2}
    rows = measure_layers(graphs, 5, (1,), Target("local"), tmp_path / "kits", record)
    assert [row["model"] for row in rows] == [p.slug for p in graphs]
    whole = {p.slug: p.path for p in graphs if p.shape == (16, 16) and p.mode == FLOAT32}
    config = BenchConfig(threads=1, batch_sizes=(5,), warmup=0, rounds=1, min_seconds=0.0)
    results = measure_models(whole, config, (1,), Target("local"), tmp_path / "kits", record)
    record.check_all_done("write layer graphs", "time layers", "measure here")
    assert [row["model"] for row in results["rows"]] == list(whole)
    assert all(0 < row["p50_ms"] <= row["p95_ms"] for row in (*rows, *results["rows"]))
    assert results["device"]["runtime_version"]


def test_what_the_target_tells_is_read_back_exactly():
    layers = Layers({"a": (32, 32)}, {"a": losses_of(32, 0)}, {}, 1, 0.0)
    graphs = [LayerGraph(f"{r}", FLOAT32, (32, 32), r, 2, Path()) for r in (None, 8, 16)]
    anchors = [Anchor(f"w{r}", FLOAT32, [(32, 32, r)], mb, Path()) for r, mb in ((None, 4.0), (8, 2.0))]
    times = {"None": 8.0, "8": 2.0, "16": 6.0, "wNone": 9.0, "w8": 5.0}  # ms; two layers in each of the first three
    rows = [
        {"model": model, "threads": 3, "p50_ms": ms, "p95_ms": 1.5 * ms, "peak_mb": 10 * ms}
        for model, ms in times.items()
    ]
    (known,) = fit_cost_models(rows, graphs, anchors, {FLOAT32: 0.25}, 7).values()
    assert known.setup == Setup(FLOAT32, 3)
    found = Search(layers, {known.setup: known}).predict(known, {"a": 12}, (), 1.0)
    # Half-way between ranks 8 and 16: 2 ms of layer time, where the models have 1 and 4.
    assert known.layer_seconds(32, 32, 12) == pytest.approx(2e-3)
    assert found.predicted.p50_ms == pytest.approx(5 + 4 / 3)
    assert found.predicted.p95_ms == pytest.approx(1.5 * (5 + 4 / 3))
    assert found.predicted.size_mb == pytest.approx(2 + 2 * (12 - 8) * 64 / (1024 - 512))
    assert found.predicted.memory_mb == pytest.approx(50 + 40 * (12 - 8) * 64 / (1024 - 512))
    assert found.loss == 1.25
    assert (
        fit_cost_models([row | {"peak_mb": None} for row in rows], graphs, anchors, {}, 7)[known.setup].memory is None
    )


# The command, on a target that answers by formula: what it must find is then known.


MS_PER_MB = 50.0


def seconds_of(m, n, rank, mode):
    """What the layer's weights weigh."""
    return parameters(m, n, rank) * (1 if mode == "int8" else 4) / 1e6 * MS_PER_MB / 1e3


def fake_layers(graphs, threads):
    return [
        {"model": p.slug, "threads": t, "p50_ms": 1e3 * p.copies * seconds_of(*p.shape, p.rank, p.mode) / t}
        for p in graphs
        for t in threads
    ]


def fake_models(models, threads):
    """What a graph takes is what its weights weigh, and something more."""
    rows = []
    for (slug, graph), count in itertools.product(models.items(), threads):
        p50 = 2 + MS_PER_MB * read_graph(graph).weight_bytes / 1e6 / count
        rows.append({"model": slug, "threads": count, "p50_ms": p50, "p95_ms": 1.2 * p50, "peak_mb": 40 + p50})
    return {"rows": rows, "device": {"cpu": "formula", "cores": 2, "os": None, "runtime_version": "0"}}


@pytest.fixture
def device(monkeypatch):
    """Notes what is asked of it."""
    asked = []

    def layers(graphs, tokens, threads, target, folder, progress):
        asked.append("layers")
        return fake_layers(graphs, threads)

    def models(models, config, threads, target, folder, progress):
        asked.append("models")
        return fake_models(models, threads)

    monkeypatch.setattr(surveying, "measure_layers", layers)
    for visits in (surveying, finals):
        monkeypatch.setattr(visits, "measure_models", models)
    return asked


@pytest.fixture(scope="module")
def config(vit_folder):
    return RunConfig(
        str(vit_folder),
        "image-classification",
        DataConfig("sklearn-digits", eval_samples=40),
        calibrate=CalibrateConfig(samples=48),
        truncate=TruncateConfig(rank_multiple=2),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fit")


def result_of(folder):
    return json.loads((folder / "fit.json").read_text())


def recommended(result):
    (row,) = [row for row in result["candidates"] if row["recommended"]]
    return row


@pytest.mark.slow
def test_three_budgets_three_models_one_survey_and_an_impossible_one(config, root, device):
    result = result_of(fit(config, root, FitRequest(Budget(p95_ms=1000.0))))
    assert result["verdict"].startswith("The dense model is within the budget")
    dense = recommended(result)
    assert (dense["mode"], dense["share_removed"], dense["measured"]["drop"]) == ("float32", 0.0, 0.0)
    assert device == ["layers", "models", "models"]

    seen = [dense]
    for share in (0.9, 0.8):
        limit = dense["measured"]["p95_ms"] * share
        row = recommended(result_of(fit(config, root, FitRequest(Budget(p95_ms=limit)))))
        assert row["measured"]["p95_ms"] <= limit
        assert row["predicted"]["p50_ms"] == pytest.approx(row["measured"]["p50_ms"], rel=0.1)
        seen.append(row)
    assert len({json.dumps(row["ranks"]) for row in seen}) == 3
    assert seen[0]["share_removed"] < seen[1]["share_removed"] < seen[2]["share_removed"]
    assert "layers" not in device[3:]  # one survey serves every budget

    model = from_pretrained(root / "fit" / "model")
    cut = {name: layer.rank for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    assert cut == seen[-1]["ranks"]
    assert open_session(root / "fit" / "model" / "onnx" / "model.onnx").get_inputs()
    assert "recommended" in (root / "fit" / "fit.md").read_text()
    assert (root / "fit" / "fit.png").stat().st_size > 1000

    with pytest.raises(BudgetError, match=r"nearest.*p95_ms"):
        fit(config, root, FitRequest(Budget(p95_ms=0.5)))
    result = result_of(root / "fit")
    assert not any(row["recommended"] for row in result["candidates"])
    assert any(row["measured"] for row in result["candidates"])
    assert "p95 over by" in (root / "fit" / "fit.md").read_text()
    assert not (root / "fit" / "model").exists()


@pytest.mark.slow
def test_what_is_slower_than_predicted_is_asked_for_once_more(config, root, device, monkeypatch):
    dense = recommended(result_of(fit(config, root, FitRequest(Budget(p95_ms=1000.0)))))
    del device[:]

    def slower(models, config, threads, target, folder, progress):
        device.append("models")
        told = fake_models(models, threads)
        cut = [row for row in told["rows"] if not row["model"].startswith("dense")]
        for row in cut:
            row |= {"p50_ms": 1.2 * row["p50_ms"], "p95_ms": 1.2 * row["p95_ms"]}
        return told

    monkeypatch.setattr(finals, "measure_models", slower)
    limit = 0.86 * dense["measured"]["p95_ms"]
    row = recommended(result_of(fit(config, root, FitRequest(Budget(p95_ms=limit)))))
    assert row["measured"]["p95_ms"] <= limit
    assert device == ["models", "models"]


def test_asked_again_nothing_is_measured_again(config, root, device):
    dense = recommended(result_of(fit(config, root, FitRequest(Budget(p95_ms=1000.0)))))
    request = FitRequest(Budget(size_mb=0.8 * dense["measured"]["size_mb"], memory_mb=1000.0))
    first = result_of(fit(config, root, request))
    del device[:]
    again = result_of(fit(config, root, request))
    assert device == []
    assert again == first
    assert recommended(again)["measured"]["size_mb"] <= request.budget.size_mb


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"drift_correction": False}, marks=pytest.mark.slow),
        pytest.param({"gradient_shrinkage": 0.5}, marks=pytest.mark.slow),
        pytest.param({"share_inputs": False}, marks=pytest.mark.slow),
    ],
)
def test_a_model_of_other_options_is_made_anew(changed, config, root, device):
    """The same ranks under other options are another model: none of the old one's may be served."""
    request = FitRequest(Budget(p95_ms=0.8 * fake_dense_ms(config, root)))
    first = recommended(result_of(fit(config, root, request)))
    other = replace(config, truncate=replace(config.truncate, **changed))
    models = {path: path.stat().st_mtime_ns for path in root.glob("stages/fit-model-*/*")}
    fit(other, root, request)
    made = [path for path in root.glob("stages/fit-model-*/*") if path not in models]
    assert made
    assert all(path.stat().st_mtime_ns == when for path, when in models.items())
    assert recommended(result_of(fit(config, root, request))) == first


def fake_dense_ms(config, root):
    return recommended(result_of(fit(config, root, FitRequest(Budget(p95_ms=1000.0)))))["measured"]["p95_ms"]


def test_a_fit_leaves_the_saved_options_as_they_are(config, root, device):
    saved = (root / "run.yaml").read_text()
    fit(replace(config, calibrate=CalibrateConfig(samples=32)), root, FitRequest(Budget(p95_ms=1000.0)))
    assert (root / "run.yaml").read_text() == saved
    assert "objective: fisher" in saved


def test_the_command_with_quantisation_ends_with_code_4_and_the_table(config, root, device, capsys):
    arguments = [config.model, "-o", str(root), "--task", config.task, "--data", "sklearn-digits", "--quantize", "int8"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *arguments, "--p95", "0.01ms", "--threads", "1"])
    assert ended.value.code == 4
    shown = capsys.readouterr()
    assert "p95 over by" in shown.out
    assert "No model was found" in shown.err
    result = result_of(root / "fit")
    assert {row["mode"] for row in result["candidates"]} == {"float32", "int8"}
    dense = {row["mode"]: row["predicted"]["size_mb"] for row in result["candidates"] if not row["ranks"]}
    assert dense["int8"] < dense["float32"]

    with pytest.raises(SystemExit) as ended:
        main(["fit", *arguments, "--size", f"{1.01 * dense['int8']:.6f}MB"])
    assert ended.value.code == 0
    row = recommended(result_of(root / "fit"))
    name = "model_int8.onnx" if row["mode"] == "int8" else "model.onnx"
    graph = root / "fit" / "model" / "onnx" / name
    assert row["measured"]["size_mb"] == read_graph(graph).file_bytes / 1e6


def test_wrong_requests_are_refused_before_anything_is_written(config, tmp_path):
    for request, match in (
        ({"target": Target("kit:here")}, "by hand"),
        ({"threads": (10_000,)}, "cores"),
    ):
        with pytest.raises(InputError, match=match):
            fit(config, tmp_path / "out", FitRequest(Budget(p95_ms=1.0), **request))
    with pytest.raises(InputError, match="--threads"):
        FitRequest(Budget(p95_ms=1.0), threads=(0,))
    result = CliRunner().invoke(cli, ["fit", config.model, "-o", str(tmp_path / "out"), "--p95", "20ms"])
    assert isinstance(result.exception, InputError)
    result = CliRunner().invoke(
        cli, ["fit", config.model, "-o", str(tmp_path / "out"), "--task", config.task, "--data", "sklearn-digits"]
    )
    assert "at least one limit" in str(result.exception)
    assert not (tmp_path / "out").exists()
