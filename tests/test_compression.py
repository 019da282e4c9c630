"""The choice of objectives, λ by trials, and the whole way from moments to factors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_drift import STRONG, divergence, prepared
from test_refinement import as_samples

from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.closed_form import Samplesets, compress
from prehab_export.compression.decompositions import decompose_layers
from prehab_export.compression.objective_choice import choose_objectives, kinds_of
from prehab_export.compression.spool import Folders
from prehab_export.compression.strength_search import find_strength
from prehab_export.compression.training import frozen_copy
from prehab_export.compression.truncation import plan_truncation, truncate


def sets(batches):
    samples = as_samples(batches)
    return Samplesets(samples, samples, batch_size=8)


def test_kinds_are_places_inside_a_block():
    _, _, _, layers, *_ = found = prepared("bert")
    kinds = kinds_of(found[0], layers)
    assert set(kinds) >= {"attention.self.query", "output.dense", "attention.output.dense"}
    assert all(len(names) == 2 for names in kinds.values())
    assert sorted(name for names in kinds.values() for name in names) == sorted(layers)


def test_a_metric_that_misleads_is_given_up_where_it_does():
    """G of one kind is made useless: its least directions count most. That kind must go to activation."""
    model, task, batches, layers, statistics, _ = prepared("llama")
    broken = [name for name in layers if name.endswith("v_proj")]
    gradients = dict(statistics.gradients)
    for name in broken:
        values, vectors = torch.linalg.eigh(gradients[name].double())
        gradients[name] = ((vectors * values.flip(0) ** 3) @ vectors.T).float()
    certain = {name: replace(sampling, error=0.0) for name, sampling in statistics.gradient_sampling.items()}
    misled = replace(statistics, gradients=gradients, gradient_sampling=certain)
    config = replace(STRONG, allocation="uniform", objective="auto")
    decomposed, trials = choose_objectives(Calibrated(model, task, misled), as_samples(batches), config)
    chosen = {trial.kind: trial for trial in trials}
    assert chosen["self_attn.v_proj"].objective == "activation"
    assert chosen["self_attn.v_proj"].change < 0
    assert {decomposed.layers[name].objective for name in broken} == {"activation"}
    for trial in trials:
        assert (trial.objective == "activation") == (trial.change < -2 * trial.standard_error)


def test_auto_is_no_worse_than_fisher_on_the_samples_it_judged_by():
    model, task, batches, _layers, statistics, _ = prepared("vit")
    results = []
    for objective in ("fisher", "auto"):
        config = replace(STRONG, objective=objective, allocation="uniform", drift_correction=False)
        result = compress(Calibrated(model, task, statistics), sets(batches), config)
        results.append(divergence(model, result.truncation.apply(frozen_copy(model)), task, batches))
    assert results[1] <= results[0] * 1.01


def test_blocks_that_are_no_chain_fall_back_to_the_plan_and_say_so():
    model, task, batches, _layers, statistics, plan = prepared("llama")
    model.model.layers[1].register_forward_pre_hook(lambda _m, args: (args[0] * 1.5, *args[1:]))
    result = compress(Calibrated(model, task, statistics), sets(batches), STRONG)
    assert "layers.1" in result.warnings[0]
    assert result.truncation.ranks == plan.ranks


@given(st.floats(-2, 2), st.integers(1, 8))
def test_the_search_finds_the_valley_within_its_budget(valley, trials):
    best, rows = find_strength(lambda strength: abs(torch.tensor(strength).log10().item() - valley), 1.0, trials)
    assert len(rows) <= trials
    assert min(rows, key=lambda row: row["loss"])["strength"] == pytest.approx(best)
    if trials == 8:
        assert abs(torch.tensor(best).log10().item() - valley) <= 0.26


@pytest.mark.parametrize("objective", ["fisher", "activation", "weight"])
@pytest.mark.parametrize("allocation", ["loss", "uniform"])
def test_a_plan_predicts_what_truncation_measures(objective, allocation):
    """Its factors, computed when they are looked up, are those of truncation, kept or not."""
    model, task, _, _, statistics, _ = prepared("llama")
    calibrated = Calibrated(model, task, statistics)
    config = replace(STRONG, objective=objective, allocation=allocation)
    measured = truncate(calibrated, config)
    for keep in (None, Folders()):
        planned = plan_truncation(calibrated, config, decompose_layers(calibrated, config, keep=keep))
        assert planned.shared == measured.shared
        assert set(planned.factors) == set(measured.factors)
        found = dict(planned.factors)
        for group in planned.shared:
            assert all(found[name].down is found[group[0]].down for name in group)
        shared = {name for group in planned.shared for name in group}
        for expected, result in zip(measured.layers, planned.layers, strict=True):
            pairs = [truncation.factors.get(expected.name) for truncation in (measured, planned)]
            if pairs[0] is not None:
                torch.testing.assert_close(*(pair.up @ pair.down for pair in pairs), rtol=1e-3, atol=1e-5)
            if expected.name not in shared:
                assert result.objective == pytest.approx(expected.objective, rel=1e-3)
                assert result.predicted_loss == pytest.approx(expected.predicted_loss, rel=1e-3)
            assert (result.rank, result.parameters_after) == (expected.rank, expected.parameters_after)
        for group in planned.shared:
            losses = [
                sum(layer.predicted_loss for layer in truncation.layers if layer.name in group)
                for truncation in (planned, measured)
            ]
            assert losses[0] == pytest.approx(losses[1], rel=1e-3)
