"""Refinement without labels: it brings a compressed model closer to the dense one, and touches only the factors."""

from dataclasses import replace

import pytest
import torch
from test_drift import STRONG, along, divergence, prepared

from converters.lowrank import low_rank_layers
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.drift import truncate_along
from prehab_export.compression.factored import Factored, factor_parameters
from prehab_export.compression.recording import hidden_of
from prehab_export.compression.refinement import block_refiner, refine, relative_error
from prehab_export.compression.training import frozen_copy
from prehab_export.config.training import RefineConfig, RefineSchedule
from prehab_export.inputs.data.samples import Samples

STEPS = RefineConfig(RefineSchedule(steps=30, batch_size=8, learning_rate=3e-3))


def as_samples(batches):
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    count = next(iter(whole.values())).shape[0]
    return Samples(torch.arange(count).numpy(), lambda rows: {key: value[list(rows)] for key, value in whole.items()})


@pytest.mark.parametrize("hidden_share", [0.0, 0.5])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_end_to_end_the_outputs_come_closer(family, hidden_share):
    model, task, batches, layers, statistics, plan = prepared(family, padded=family == "bert")
    student = along(model, task, batches, layers, statistics, plan).apply(frozen_copy(model))
    before, ranks = divergence(model, student, task, batches), plan.ranks
    others = {n: p.clone() for n, p in student.named_parameters() if id(p) not in map(id, factor_parameters(student))}
    rows = refine(
        Factored(student, task), as_samples(batches), replace(STEPS, hidden_share=hidden_share), teacher=model
    )
    assert divergence(model, student, task, batches) < 0.9 * before
    assert len(rows) == 30
    assert ("hidden_error" in rows[0]) == bool(hidden_share)
    assert {name: layer.rank for name, layer in low_rank_layers(student).items()} == ranks
    now = dict(student.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in others.items())


def test_labels_are_not_looked_at():
    model, task, batches, _layers, _statistics, plan = prepared("bert")
    results = []
    for shift in (0, 1):
        student = plan.apply(frozen_copy(model))
        relabelled = [batch | {"labels": (batch["labels"] + shift) % 2} for batch in batches]
        refine(Factored(student, task), as_samples(relabelled), STEPS, teacher=model)
        results.append(torch.cat([p.flatten() for p in factor_parameters(student)]))
    assert torch.equal(*results)


def test_block_by_block_the_states_come_closer():
    """The mean relative error of the last block's output, against the same walk without tuning."""
    model, task, batches, _layers, statistics, plan = prepared("llama")

    def last_states(candidate):
        seen = []
        handle = candidate.model.layers[-1].register_forward_hook(lambda _m, _a, out: seen.append(hidden_of(out)))
        with torch.no_grad():
            for batch in batches:
                task.logits(candidate, batch)
        handle.remove()
        return torch.cat(seen)

    errors = []
    for steps in (0, 30):
        config = replace(STEPS, block_steps=steps, block_learning_rate=3e-3)
        result = truncate_along(
            Calibrated(model, task, statistics),
            batches,
            plan,
            gradient_shrinkage=STRONG.gradient_shrinkage,
            after_block=block_refiner(config, statistics, seed=0),
        )
        student = result.apply(frozen_copy(model))
        errors.append(float(relative_error(last_states(student), last_states(model), None)))
    assert errors[1] < 0.99 * errors[0]


def test_relative_error_against_numpy():
    generator = torch.Generator().manual_seed(0)
    target, output = (torch.randn(3, 5, 4, generator=generator) for _ in range(2))
    mask = torch.rand(3, 5, generator=generator) < 0.7
    t, o = target.numpy()[mask.numpy()].astype("float64"), output.numpy()[mask.numpy()].astype("float64")
    expected = ((o - t) ** 2).sum() / ((t - t.mean(0)) ** 2).sum()
    assert float(relative_error(output, target, mask)) == pytest.approx(expected, rel=1e-5)
