"""Ranks by measured time: the measurement, the allocation by it, and the whole way from the command line."""

import itertools
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from progress_record import ProgressRecord
from runs import stage_folder
from test_allocation import spectrum_losses
from test_pipeline import UNGUARDED, invoke, vit_options

from prehab_export.linalg.allocation import _lower_hull, break_even, by_joint_loss, parameters, rank_menu
from prehab_export.measurement import rank_times
from prehab_export.measurement.rank_times import Curve, RankTimes, Setting, measure_rank_times, measured_ranks

SETTING = Setting(threads=1, tokens=4)


def by_parameters(m, n, _copies, _setting):
    """Times of a machine on which every parameter costs the same."""
    ranks = measured_ranks(m, n)
    return Curve(1e-9 * m * n, ranks, tuple(1e-9 * rank * (m + n) for rank in ranks))


def dense_is_fastest(m, n, _copies, _setting):
    return Curve(1e-9, (1, 8), (2e-9, 3e-9))


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_the_measured_ranks_rise_to_break_even(m, n):
    ranks = measured_ranks(m, n)
    assert list(ranks) == sorted(set(ranks))
    assert ranks[0] >= 1
    assert ranks[-1] == break_even(m, n)
    assert len(ranks) <= rank_times.POINTS + 1


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8), st.data())
def test_a_curve_goes_through_its_points_and_never_falls(seconds, data):
    ranks = tuple(sorted(data.draw(st.sets(st.integers(1, 500), min_size=len(seconds), max_size=len(seconds)))))
    curve = Curve(1.0, ranks, tuple(seconds))
    for at, rank in enumerate(ranks):
        assert curve.at(rank) == pytest.approx(max(seconds[: at + 1]))
    times = [curve.at(rank) for rank in range(1, ranks[-1] + 20)]
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(times))
    assert min(times) > 0


@pytest.mark.parametrize("rank", [None, 3])
def test_what_is_timed_is_the_layer(rank):
    model = rank_times.layer_graph(5, 6, rank, copies=2, tokens=4)
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    x = np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32)
    for copy, output in enumerate(session.run(None, {"x": x})):
        parts = [weights[f"weight_{copy}_{part}"] for part in range(1 if rank is None else 2)]
        assert [part.shape for part in parts] == ([(6, 5)] if rank is None else [(6, 3), (3, 5)])
        np.testing.assert_allclose(output, np.linalg.multi_dot([x, *parts]) if rank else x @ parts[0], rtol=1e-5)


@pytest.mark.parametrize("reason", ["no folder", "no room"])
def test_measurements_that_cannot_be_kept_are_no_reason_to_fail(reason, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    if reason == "no folder":
        cache.write_text("a file stands there")
    else:
        write = Path.write_text
        monkeypatch.setattr(Path, "write_text", lambda _path, text, **_: write(Path("/dev/full"), text))
    curve = measure_rank_times([(16, 32)], SETTING, cache=cache).curves[16, 32]
    assert curve.dense > 0
    assert cache.is_file() or not list(cache.iterdir())


def test_measured_once_and_then_looked_up(tmp_path, monkeypatch):
    shapes = [(64, 32), (64, 32), (16, 32)]
    record = ProgressRecord()
    first = measure_rank_times(shapes, SETTING, cache=tmp_path, progress=record)
    record.check_all_done("time layers")
    assert record.works[0].steps == 2
    for curve in first.curves.values():
        assert min(curve.dense, *curve.seconds) > 0
    monkeypatch.setattr(rank_times, "_measure", lambda *_: pytest.fail("measured again"))
    assert measure_rank_times(shapes, SETTING, cache=tmp_path).curves == first.curves
    assert RankTimes.from_json(json.loads(json.dumps(first.to_json()))).curves == first.curves
    with pytest.raises(pytest.fail.Exception):  # other threads are another measurement
        measure_rank_times(shapes, Setting(threads=2, tokens=4), cache=tmp_path)


@given(seed=st.integers(0, 1000), keep=st.floats(0.1, 0.9))
def test_no_choice_of_the_menus_does_better_for_the_time_spent(seed, keep):
    """Against every combination of hull entries; times are random, concave or not, and dense may be the fastest."""
    shapes = {"a": (12, 12), "b": (24, 12), "c": (12, 20)}
    losses = {name: spectrum_losses(min(shape), seed + at) * 5**at for at, (name, shape) in enumerate(shapes.items())}
    generator = np.random.default_rng(seed)
    curves = {}
    for m, n in shapes.values():
        ranks = tuple(range(1, break_even(m, n) + 1))
        steps = generator.random(len(ranks)) * generator.choice([0.01, 1.0], len(ranks))
        curves[m, n] = Curve(float(generator.random() * 8), ranks, tuple(np.cumsum(steps) + 0.1))
    cost = RankTimes(SETTING, curves).cost
    found = by_joint_loss(shapes, losses, {}, keep, floor_share=0.0, cost=cost)
    hulls = [_lower_hull(rank_menu(*shape, losses[name], 1, 0.0, cost)) for name, shape in shapes.items()]
    least = sum(hull[0].cost for hull in hulls)
    assert found.cost <= max(least, keep * sum(cost(m, n, None) for m, n in shapes.values())) + 1e-9
    assert found.cost == pytest.approx(sum(cost(*shapes[name], rank) for name, rank in found.ranks.items()))
    for choices in itertools.product(*hulls):
        if sum(choice.cost for choice in choices) <= least + 1e-12:
            assert sum(choice.loss for choice in choices) >= found.predicted_loss - 1e-9
    for name, (m, n) in shapes.items():
        if all(cost(m, n, rank) >= cost(m, n, None) for rank in range(1, break_even(m, n))):
            assert found.ranks[name] is None


def test_parameters_are_the_default_cost():
    shapes = {"a": (24, 24), "b": (48, 24)}
    losses = {name: spectrum_losses(24, at) for at, name in enumerate(shapes)}
    assert by_joint_loss(shapes, losses, {}, 0.5) == by_joint_loss(shapes, losses, {}, 0.5, cost=parameters)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
def test_a_run_within_a_budget_of_latency(vit_folder, tmp_path, own_cache, monkeypatch, capsys):
    monkeypatch.setattr(rank_times, "_measure", by_parameters)
    output = tmp_path / "run"
    options = [*vit_options(vit_folder), "-o", output, "--budget", "latency:0.5"]
    assert invoke("run", *options, "--prehab-steps", "2", *UNGUARDED) == 0
    report = json.loads((output / "report" / "report.json").read_text())
    times = json.loads((stage_folder(output, "times") / "times.json").read_text())
    assert report["truncate"]["predicted_latency"] <= 0.5 + 1e-9
    # Here time is parameters, so that the share of one is the share of the other.
    kept = 1 - report["truncate"]["selected_share_removed"]
    assert report["truncate"]["predicted_latency"] == pytest.approx(kept, rel=1e-3)
    assert times["setting"] == {"threads": 1, "tokens": 17}
    assert "latency:0.5" in (output / "artifact" / "README.md").read_text()
    capsys.readouterr()
    monkeypatch.setattr(rank_times, "_measure", lambda *_: pytest.fail("measured again"))
    assert invoke("run", *options, "--prehab-steps", "2", *UNGUARDED) == 0


def test_where_no_layer_is_faster_in_two_factors_that_is_said(vit_folder, tmp_path, own_cache, monkeypatch, capsys):
    monkeypatch.setattr(rank_times, "_measure", dense_is_fastest)
    assert invoke("truncate", *vit_options(vit_folder), "-o", tmp_path / "run", "--budget", "latency:0.5") == 2
    assert "no layer is faster as two factors on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget", "latency:2"], "between 0 and 1"),
        (["--budget", "latency:0.0"], "between 0 and 1"),
        (["--budget", "joules:0.5"], "latency:0.5"),
        (["--budget", "latency:0.5", "--allocation", "uniform"], "--allocation loss"),
    ],
)
def test_bad_budgets(vit_folder, tmp_path, flags, words, capsys):
    assert invoke("truncate", *vit_options(vit_folder), "-o", tmp_path / "run", *flags) == 2
    assert words in capsys.readouterr().err


def test_refinement_has_a_verb(vit_folder, tmp_path, capsys):
    assert invoke("refine", *vit_options(vit_folder), "-o", tmp_path / "run", "--refine-steps", "2") == 0
    facts = json.loads((stage_folder(tmp_path / "run", "refine") / "refine.json").read_text())
    assert len(facts["history"]) == 2
