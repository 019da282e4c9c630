"""Prehab and rehab: gradients against autograd in float64, and what a short run must and must not change."""

import copy
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import transformers

from converters.errors import InputError
from converters.lowrank import dense_weight, factorize, low_rank_layers
from converters.roots import square_root
from converters.selection import select_layers
from prehab_export import calibrate, load_data, prehab, rehab, truncate
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.decompositions import decompose_layers
from prehab_export.compression.factored import Factored
from prehab_export.compression.metric import layer_metric
from prehab_export.compression.planning import RankPlan, plan_ranks
from prehab_export.compression.regulariser import Regulariser
from prehab_export.compression.training import Trainable, frozen_copy, labelled_loss, train
from prehab_export.config.data import DataConfig
from prehab_export.config.training import (
    LAYER_WEIGHTS,
    PROXIMAL_SURROGATES,
    REHAB_METHODS,
    SURROGATES,
    UPDATES,
    WHITENINGS,
    PrehabConfig,
    RehabConfig,
    Schedule,
    TrainConfig,
)
from prehab_export.config.truncate import TruncateConfig
from prehab_export.inputs.evaluation import evaluate, torch_predictor
from prehab_export.inputs.tasks import TASKS
from prehab_export.linalg import surrogates

TASK = TASKS["image-classification"]
LOSS = labelled_loss(TASK)
CUT = TruncateConfig(ratio=0.7, objective="activation", allocation="uniform")


@pytest.fixture(scope="module")
def digits():
    """A ViT that has learned something of the digits, its data and its moments."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        id2label={digit: str(digit) for digit in range(10)},
    )
    model = transformers.ViTForImageClassification(config)
    processor = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})
    data = load_data(DataConfig("sklearn-digits"), TASK, processor, config, seed=0)
    train(Trainable(model, list(model.parameters())), data.train, Schedule(steps=150, learning_rate=3e-3), LOSS)
    statistics = calibrate(model, TASK, data.train.first(128).batches(32), select_layers(model)).statistics
    return model, data, statistics


def loss_of(model, samples):
    return evaluate(torch_predictor(model, TASK), TASK, samples.batches(128)).loss


def truncated(model, samples, cut=CUT):
    layers = select_layers(model)
    statistics = calibrate(model, TASK, samples.first(128).batches(32), layers).statistics
    return factorize(frozen_copy(model), truncate(Calibrated(model, TASK, statistics), cut).factors)


EXACT = [name for name in SURROGATES if not name.startswith("stochastic")]
RANK_SHARE = 0.3  # what CUT keeps


def reference_surrogate(name, weight, root_g, root_c, rank):
    sigma = torch.linalg.svdvals(root_g @ weight @ root_c)
    energy = sigma.square().sum()
    return {
        "nuclear": sigma.sum(),
        "stable-rank": sigma.sum() ** 2 / energy,
        "spectral": energy / sigma[0] ** 2,
        "tail": sigma[rank:].square().sum(),
    }[name]


def reference_size(kind, weight, c, g, rank):
    """What a layer's λ is in proportion to, by brute force; CUT truncates by ``activation``."""
    if kind == "equal":
        return 1.0
    delta = weight
    if kind == "loss":
        u = torch.linalg.svd(weight @ square_root(c), full_matrices=False).U
        kept = u[:, :rank] @ u[:, :rank].T @ weight
        delta = weight - kept
    return float(torch.trace(g @ delta @ c @ delta.T))


def references(name, model, statistics, use_gradients, kind):
    """By layer: weight in float64, normalised surrogate (of that weight, with autograd), weight of the layer."""
    weights, values, sizes = {}, {}, {}
    for layer_name, layer in select_layers(model).items():
        metric = layer_metric(layer_name, layer, statistics, CUT.gradient_shrinkage)
        rank = int(RANK_SHARE * layer.weight.numel() / sum(layer.weight.shape) + 1e-9)
        weight = dense_weight(layer).detach().double().requires_grad_()
        root_g = square_root(metric.gradient_moment) if use_gradients else torch.eye(weight.shape[0]).double()
        value = reference_surrogate(name, weight, root_g, square_root(metric.second_moment), rank)
        weights[layer_name], values[layer_name] = weight, value / value.detach()
        sizes[layer_name] = reference_size(kind, weight.detach(), metric.second_moment, metric.gradient_moment, rank)
    mean = sum(sizes.values()) / len(sizes)
    return weights, values, {layer_name: size / mean for layer_name, size in sizes.items()}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("use_gradients", [True, False])
@pytest.mark.parametrize("kind", LAYER_WEIGHTS)
def test_gradient_in_the_weight_is_that_of_the_weighted_normalised_mean(name, use_gradients, kind, digits):
    model, _, statistics = digits
    model = copy.deepcopy(model)
    layers = select_layers(model)
    whitening = "fisher" if use_gradients else "activation"
    regulariser = Regulariser(
        Calibrated(model, TASK, statistics),
        PrehabConfig(surrogate=name, update="gradient", whitening=whitening, layer_weights=kind),
        CUT,
    )
    regulariser.refresh(statistics)
    model.zero_grad()
    regulariser.add_gradients(0, strength=5.0)
    assert regulariser.value == pytest.approx(1.0, rel=5e-3)
    weights, values, sizes = references(name, model, statistics, use_gradients, kind)
    for layer_name, layer in layers.items():
        loss = 5.0 / len(layers) * sizes[layer_name] * values[layer_name]
        (expected,) = torch.autograd.grad(loss, weights[layer_name])
        assert (layer.weight.grad.double() - expected).norm() <= 2e-2 * expected.norm(), layer_name


def test_tails_weighed_by_loss_are_the_predicted_loss_over_its_start(digits):
    """Truncation by ``fisher``, whitening by ``fisher``, weights by ``loss``: all layers then share one scale."""
    model, _, statistics = digits
    model = copy.deepcopy(model)
    layers = select_layers(model)
    cut = replace(CUT, objective="fisher")
    regulariser = Regulariser(Calibrated(model, TASK, statistics), PrehabConfig(update="gradient"), cut)
    regulariser.refresh(statistics)
    before = truncate(Calibrated(model, TASK, statistics), cut).summary()["predicted_loss_increase"]
    with torch.no_grad():
        for index, layer in enumerate(layers.values()):
            layer.weight *= 0.5 + 0.1 * index
    regulariser.add_gradients(0, 0.0)
    after = truncate(Calibrated(model, TASK, statistics), cut).summary()["predicted_loss_increase"]
    assert regulariser.value == pytest.approx(after / before, rel=1e-2)


def test_layers_take_turns_and_hold_their_gradient_in_between(digits):
    model, _, statistics = digits
    model = copy.deepcopy(model)
    layers = select_layers(model)
    regulariser = Regulariser(Calibrated(model, TASK, statistics), PrehabConfig(update="gradient", every=4), CUT)
    regulariser.refresh(statistics)

    def gradients(step):
        model.zero_grad()
        regulariser.add_gradients(step, 1.0)
        return {name: layer.weight.grad.clone() for name, layer in layers.items()}

    first = gradients(0)
    with torch.no_grad():
        for layer in layers.values():
            layer.weight *= 0.9
    before, seen = first, set()
    for step in range(1, 5):
        now = gradients(step)
        changed = {name for name in layers if not torch.equal(now[name], before[name])}
        assert changed == set(list(layers)[step % 4 :: 4])
        assert all((now[name] - 0.9 * first[name]).norm() < 1e-2 * first[name].norm() for name in changed)
        before, seen = now, seen | changed
    assert seen == set(layers)
    assert regulariser.value == pytest.approx(0.81, rel=1e-3)
    doubled = {name: 2 * gradient for name, gradient in gradients(5).items()}
    model.zero_grad()
    regulariser.add_gradients(9, 2.0)  # the same turn; λ is that of the step, also for what is held
    for name, layer in layers.items():
        assert (layer.weight.grad - doubled[name]).norm() < 1e-2 * doubled[name].norm()


@pytest.mark.parametrize("surrogate", PROXIMAL_SURROGATES)
@pytest.mark.parametrize("every", [1, 3])
def test_proximal_steps_shrink_by_rate_and_turn(surrogate, every, digits):
    model, _, statistics = digits
    model = copy.deepcopy(model)
    layers = select_layers(model)
    cut = replace(CUT, objective="fisher")
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    config = PrehabConfig(surrogate=surrogate, update="proximal", every=every, layer_weights="equal")
    regulariser = Regulariser(Calibrated(model, TASK, statistics), config, cut)
    regulariser.refresh(statistics)
    start = truncate(Calibrated(model, TASK, statistics), cut)
    for step in range(every):
        regulariser.shrink(step, rate=0.2)
    end = truncate(Calibrated(model, TASK, statistics), cut)
    for old, new in zip(start.layers, end.layers, strict=True):
        if surrogate == "tail":  # every layer had one turn, for all its steps
            assert new.objective == pytest.approx(old.objective / (1 + 0.2 * every) ** 2, rel=1e-2)
        else:
            assert new.objective < old.objective
    if surrogate == "tail":  # what truncation keeps is left alone
        for name in layers:
            kept, now = start.factors[name], end.factors[name]
            original = kept.up @ kept.down
            assert (now.up @ now.down - original).norm() < 2e-2 * original.norm()
    assert not any(torch.equal(layer.weight, before[name]) for name, layer in layers.items())


def planned(calibrated, cut):
    """Ranks by unit, as truncation itself would plan them."""
    plan = plan_ranks(calibrated, decompose_layers(calibrated, cut), cut)
    units = [*plan.shared, *((name,) for name in calibrated.layers if not any(name in group for group in plan.shared))]
    return {unit: plan.ranks[unit[0]] for unit in units if plan.ranks[unit[0]] is not None}


@pytest.mark.parametrize("share_inputs", [True, False])
def test_tail_follows_the_allocation_as_it_changes(share_inputs, digits):
    model, _, statistics = digits
    calibrated = Calibrated(copy.deepcopy(model), TASK, statistics)
    cut = TruncateConfig(ratio=0.7, share_inputs=share_inputs)
    regulariser = Regulariser(calibrated, PrehabConfig(), cut)
    regulariser.refresh(statistics)
    first = dict(regulariser.ranks)
    assert first == planned(calibrated, cut)
    unit = next(unit for unit in first if "fc1" in unit[0])
    with torch.no_grad():
        calibrated.layers[unit[0]].weight *= 3  # its loss grows ninefold, and so its claim on ranks
    regulariser.refresh(statistics)
    assert regulariser.ranks == planned(calibrated, cut) != first
    assert unit not in regulariser.ranks or regulariser.ranks[unit] > first[unit]
    for step in range(regulariser.config.every):
        regulariser.add_gradients(step, 0.0)
    assert set(regulariser.terms) == set(regulariser.ranks)
    for other, term in regulariser.terms.items():
        assert isinstance(term.surrogate, surrogates.Tail)
        assert term.surrogate.top.shape[1] == regulariser.ranks[other]


@pytest.mark.parametrize("whitening", WHITENINGS)
def test_layers_with_one_down_have_one_tail(whitening, digits):
    """The tail of the stacked weight, G block-diagonal, against autograd; and its proximal step."""
    model, _, statistics = digits
    model = copy.deepcopy(model)
    layers = select_layers(model)
    objective = "fisher" if whitening == "fisher" else "activation"
    cut = TruncateConfig(ratio=0.7, objective=objective)
    decomposed = decompose_layers(Calibrated(model, TASK, statistics), cut)
    regulariser = Regulariser(
        Calibrated(model, TASK, statistics), PrehabConfig(whitening=whitening, layer_weights="equal"), cut
    )
    group = next(iter(decomposed.groups))
    plan = RankPlan(dict.fromkeys(layers) | dict.fromkeys(group, 9), (group,))
    with patch("prehab_export.compression.regulariser.ranks_by", lambda *_: plan):
        regulariser.refresh(statistics)
    assert regulariser.ranks == {group: 9}
    model.zero_grad()
    regulariser.add_gradients(0, strength=1.0)
    metrics = [layer_metric(name, layers[name], statistics, cut.gradient_shrinkage) for name in group]
    stacked = torch.cat([dense_weight(layers[name]).detach().double() for name in group]).requires_grad_()
    root_g = torch.block_diag(*(square_root(metric.gradient_moment) for metric in metrics))
    if whitening == "activation":
        root_g = torch.eye(len(stacked)).double()
    value = reference_surrogate("tail", stacked, root_g, square_root(metrics[0].second_moment), 9)
    (expected,) = torch.autograd.grad(value / value.detach(), stacked)
    found = torch.cat([dense_weight(layers[name].requires_grad_()).grad for name in group]).double()
    assert (found - expected).norm() < 1e-2 * expected.norm()
    config = PrehabConfig(whitening=whitening, layer_weights="equal", update="proximal", every=1)
    proximal = Regulariser(Calibrated(model, TASK, statistics), config, cut)
    with patch("prehab_export.compression.regulariser.ranks_by", lambda *_: plan):
        proximal.refresh(statistics)
    proximal.shrink(0, 1.0)
    after = decompose_layers(Calibrated(model, TASK, statistics), cut).groups[group].losses
    before = decomposed.groups[group].losses
    assert float(after[9]) == pytest.approx(float(before[9]) / 4, rel=1e-2)
    assert float(after[0] - after[9]) == pytest.approx(float(before[0] - before[9]), rel=1e-3)


def test_gradient_of_a_conv1d_is_transposed():
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=16)
    )
    layers = select_layers(model)
    task = TASKS["text-generation"]
    batch = {"input_ids": torch.randint(0, 30, (4, 12))}
    statistics = calibrate(model.eval(), task, [batch], layers).statistics
    regulariser = Regulariser(Calibrated(model, task, statistics), PrehabConfig(every=1), CUT)
    regulariser.refresh(statistics)
    regulariser.add_gradients(0, 1.0)
    assert all(layer.weight.grad.shape == layer.weight.shape for layer in layers.values())
    before = regulariser.value
    with torch.no_grad():
        for layer in layers.values():
            layer.weight -= 1e-3 * layer.weight.grad / layer.weight.grad.norm()
    regulariser.add_gradients(1, 0.0)
    assert regulariser.value < before
    proximal = Regulariser(Calibrated(model, task, statistics), PrehabConfig(update="proximal", every=1), CUT)
    proximal.refresh(statistics)
    proximal.shrink(0, 1.0)
    proximal.shrink(1, 0.0)
    assert proximal.value < 0.5


def test_statistics_without_gradients_are_refused_with_the_way_out(digits):
    model, _, statistics = digits
    bare = replace(statistics, gradients={})
    for options in ({}, {"whitening": "activation"}):
        with pytest.raises(InputError, match=r"prehab\.layer_weights=equal"):
            Regulariser(Calibrated(model, TASK, statistics), PrehabConfig(**options), CUT).refresh(bare)
    Regulariser(
        Calibrated(model, TASK, statistics), PrehabConfig(whitening="activation", layer_weights="equal"), CUT
    ).refresh(bare)


def test_only_surrogates_with_a_proximal_map_take_proximal_steps():
    for surrogate in SURROGATES:
        if surrogate in PROXIMAL_SURROGATES:
            PrehabConfig(surrogate=surrogate, update="proximal")
        else:
            with pytest.raises(InputError, match="proximal"):
                PrehabConfig(surrogate=surrogate, update="proximal")


@pytest.mark.parametrize("update", UPDATES)
def test_prehab_makes_truncation_hurt_less_than_the_same_steps_of_task_loss(update, digits):
    model, data, statistics = digits
    steps = TrainConfig(steps=60, learning_rate=1e-3)
    control = copy.deepcopy(model)
    loss = labelled_loss(TASK, frozen_copy(model), steps.distill)
    train(Trainable(control, list(control.parameters())), data.train, steps, loss)
    prepared = copy.deepcopy(model)
    config = PrehabConfig(train=steps, strength={"gradient": 30.0, "proximal": 100.0}[update], update=update)
    history = prehab(Calibrated(prepared, TASK, statistics), data.train, config, CUT)
    assert [row["step"] for row in history] == list(range(60))
    assert history[-1]["surrogate"] < 0.5 * history[0]["surrogate"]
    losses = {
        name: loss_of(truncated(candidate, data.train), data.evaluation)
        for name, candidate in (("nothing", model), ("control", control), ("prehab", prepared))
    }
    assert losses["prehab"] < losses["control"]
    assert losses["prehab"] < losses["nothing"]


COURSES = [(name, "gradient", "constant") for name in SURROGATES] + [
    ("tail", "gradient", "warmup"),
    *((name, "proximal", "constant") for name in PROXIMAL_SURROGATES),
]


@pytest.mark.parametrize(("surrogate", "update", "schedule"), COURSES)
def test_every_surrogate_update_and_schedule_runs_and_repeats(surrogate, update, schedule, digits):
    model, data, statistics = digits
    config = PrehabConfig(
        train=TrainConfig(steps=4),
        surrogate=surrogate,
        schedule=schedule,
        update=update,
        refresh_every=2,
        refresh_samples=16,
        strength=1.0,
    )
    results = []
    for _ in range(2):
        own = copy.deepcopy(model)
        history = prehab(Calibrated(own, TASK, statistics), data.train, config, TruncateConfig(ratio=0.7), seed=5)
        results.append((history, own.state_dict()))
    (first, state), (again, same) = results
    assert first == again
    assert all(torch.equal(state[name], same[name]) for name in state)
    strengths = [row["strength"] for row in first]
    assert strengths == [1.0] * 4 if schedule == "constant" else strengths[0] < strengths[-1] <= 1.0


@pytest.mark.parametrize("method", REHAB_METHODS)
def test_rehab_helps_and_keeps_the_ranks(method, digits):
    model, data, _ = digits
    held_out, training = data.train.split(200, seed=0)
    compressed = truncated(model, training, TruncateConfig(ratio=0.85, objective="activation", allocation="uniform"))
    before = loss_of(compressed, held_out)
    ranks = {name: layer.rank for name, layer in low_rank_layers(compressed).items()}
    start = {name: value.clone() for name, value in compressed.state_dict().items()}
    config = RehabConfig(train=TrainConfig(steps=40, learning_rate=2e-3), method=method, lora_rank=4)
    result = rehab(
        Factored(compressed, TASK),
        training,
        config,
        held_out_loss=lambda m: loss_of(m, held_out),
        teacher=frozen_copy(model),
    )
    assert loss_of(compressed, held_out) < before
    assert loss_of(compressed, held_out) == min(part["held_out_loss"] for part in result.parts)
    assert {name: layer.rank for name, layer in low_rank_layers(compressed).items()} == ranks
    assert set(compressed.state_dict()) == set(start)
    uncut = ("vit.embeddings.cls_token", "classifier.weight", "vit.layernorm.bias")
    moved = [not torch.equal(compressed.state_dict()[name], start[name]) for name in uncut]
    assert moved == [method == "all"] * len(uncut)
    assert [row["step"] for row in result.history] == list(range(40))


@pytest.mark.parametrize("method", REHAB_METHODS)
def test_rehab_that_does_not_help_leaves_no_trace(method, digits):
    model, data, _ = digits
    compressed = truncated(model, data.train)
    before = {name: value.clone() for name, value in compressed.state_dict().items()}
    losses = iter([1.0, 2.0, 3.0])
    config = RehabConfig(train=TrainConfig(steps=4, learning_rate=0.5, distill=0.0), method=method)
    result = rehab(Factored(compressed, TASK), data.train, config, held_out_loss=lambda _: next(losses))
    assert not any(part["kept"] for part in result.parts[1:])
    assert all(torch.equal(value, before[name]) for name, value in compressed.state_dict().items())


def test_training_touches_only_what_it_is_given(digits):
    model, data, _ = digits
    own = copy.deepcopy(model)
    own.classifier.requires_grad_(False)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    train(Trainable(own, [own.vit.layers[0].mlp.fc1.weight]), data.train, Schedule(steps=2), LOSS)
    changed = [name for name, value in own.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["vit.layers.0.mlp.fc1.weight"]
    assert not own.classifier.weight.requires_grad
    assert own.vit.layers[1].mlp.fc1.weight.requires_grad


def test_a_diverging_run_says_what_to_change(digits):
    model, data, _ = digits
    own = copy.deepcopy(model)
    own.classifier.weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="learning rate"):
        train(Trainable(own, list(own.parameters())), data.train, Schedule(steps=1), LOSS)
