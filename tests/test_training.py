"""Prehab and rehab: gradients against autograd in float64, and what a short run must and must not change."""

import copy

import pytest
import torch
import transformers

from converters.lowrank import dense_weight, factorize, low_rank_layers
from converters.targets import target_layers
from prehab_export import calibrate, load_data, prehab, rehab, truncate
from prehab_export.config import SURROGATES, DataConfig, PrehabConfig, RehabConfig, TrainConfig, TruncateConfig
from prehab_export.decomposition import square_root
from prehab_export.evaluation import evaluate, torch_predictor
from prehab_export.prehabilitation import Regulariser
from prehab_export.tasks import TASKS
from prehab_export.training import frozen_copy, train
from prehab_export.truncation import layer_metric

TASK = TASKS["image-classification"]
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
    train(model, TASK, data.train, TrainConfig(steps=150, learning_rate=3e-3, distill=0.0), list(model.parameters()))
    statistics = calibrate(model, data.train.first(128).batches(32), TASK, target_layers(model))
    return model, data, statistics


def loss_of(model, samples):
    return evaluate(torch_predictor(model, TASK), samples.batches(128), TASK).loss


def truncated(model, samples, cut=CUT):
    layers = target_layers(model)
    statistics = calibrate(model, samples.first(128).batches(32), TASK, layers)
    return factorize(frozen_copy(model), truncate(layers, statistics, cut).factors)


def reference_surrogate(name, weight, root_g, root_c, rank):
    sigma = torch.linalg.svdvals(root_g @ weight @ root_c)
    energy = sigma.square().sum()
    return {
        "nuclear": sigma.sum(),
        "stable-rank": sigma.sum() ** 2 / energy,
        "spectral": energy / sigma[0] ** 2,
        "tail": sigma[rank:].square().sum(),
    }[name]


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("use_gradients", [True, False])
def test_gradient_in_the_weight_is_that_of_the_normalised_mean(name, use_gradients, digits):
    model, _, statistics = digits
    model = copy.deepcopy(model)
    layers = target_layers(model)
    regulariser = Regulariser(layers, name, use_gradients, CUT)
    regulariser.refresh(statistics)
    ranks = {
        layer_name: int(0.3 * layer.weight.numel() / sum(layer.weight.shape) + 1e-9)
        for layer_name, layer in layers.items()
    }
    model.zero_grad()
    value = regulariser.add_gradients(strength=5.0)
    assert value == pytest.approx(1.0, rel=5e-3)
    references, weights = {}, {}
    for layer_name, layer in layers.items():
        metric = layer_metric(layer_name, layer, statistics, CUT.gradient_damping)
        root_g = square_root(metric.gradient_moment) if use_gradients else torch.eye(layer.weight.shape[0]).double()
        weights[layer_name] = dense_weight(layer).detach().double().requires_grad_()
        root_c = square_root(metric.second_moment)
        references[layer_name] = reference_surrogate(name, weights[layer_name], root_g, root_c, ranks[layer_name])
    scales = {layer_name: reference.detach() for layer_name, reference in references.items()}
    if name == "tail" and use_gradients:  # tails that are losses share one scale
        scales = dict.fromkeys(references, torch.stack(list(scales.values())).mean())
    for layer_name, layer in layers.items():
        (expected,) = torch.autograd.grad(
            5.0 / len(layers) * references[layer_name] / scales[layer_name], weights[layer_name]
        )
        assert (layer.weight.grad.double() - expected).norm() <= 2e-2 * expected.norm(), layer_name


def test_gradient_of_a_conv1d_is_transposed():
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=16)
    )
    layers = target_layers(model)
    task = TASKS["text-generation"]
    batch = {"input_ids": torch.randint(0, 30, (4, 12))}
    statistics = calibrate(model.eval(), [batch], task, layers)
    regulariser = Regulariser(layers, "tail", True, CUT)
    regulariser.refresh(statistics)
    regulariser.add_gradients(1.0)
    assert all(layer.weight.grad.shape == layer.weight.shape for layer in layers.values())
    before = regulariser.add_gradients(0.0)
    with torch.no_grad():
        for layer in layers.values():
            layer.weight -= 1e-3 * layer.weight.grad / layer.weight.grad.norm()
    assert regulariser.add_gradients(0.0) < before


def test_prehab_makes_truncation_hurt_less_than_the_same_steps_of_task_loss(digits):
    model, data, statistics = digits
    steps = TrainConfig(steps=60, learning_rate=1e-3)
    control = copy.deepcopy(model)
    train(control, TASK, data.train, steps, list(control.parameters()), teacher=frozen_copy(model))
    prepared = copy.deepcopy(model)
    history = prehab(
        prepared, TASK, data.train, target_layers(prepared), statistics, PrehabConfig(train=steps, strength=30.0), CUT
    )
    assert [row["step"] for row in history] == list(range(60))
    assert history[-1]["surrogate"] < 0.5 * history[0]["surrogate"]
    losses = {
        name: loss_of(truncated(candidate, data.train), data.evaluation)
        for name, candidate in (("nothing", model), ("control", control), ("prehab", prepared))
    }
    assert losses["prehab"] < losses["control"]
    assert losses["prehab"] < losses["nothing"]


@pytest.mark.parametrize("schedule", ["constant", "warmup"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_surrogate_and_schedule_runs_and_repeats(surrogate, schedule, digits):
    model, data, statistics = digits
    config = PrehabConfig(
        train=TrainConfig(steps=4),
        surrogate=surrogate,
        schedule=schedule,
        refresh_every=2,
        refresh_samples=16,
        strength=1.0,
    )
    results = []
    for _ in range(2):
        own = copy.deepcopy(model)
        history = prehab(
            own, TASK, data.train, target_layers(own), statistics, config, TruncateConfig(ratio=0.7), seed=5
        )
        results.append((history, own.state_dict()))
    (first, state), (again, same) = results
    assert first == again
    assert all(torch.equal(state[name], same[name]) for name in state)
    strengths = [row["strength"] for row in first]
    assert strengths == [1.0] * 4 if schedule == "constant" else strengths[0] < strengths[-1] <= 1.0


@pytest.mark.parametrize("method", ["factors", "lora"])
def test_rehab_helps_and_keeps_the_ranks(method, digits):
    model, data, _ = digits
    held_out, training = data.train.split(200, seed=0)
    compressed = truncated(model, training, TruncateConfig(ratio=0.85, objective="activation", allocation="uniform"))
    before = loss_of(compressed, held_out)
    ranks = {name: layer.rank for name, layer in low_rank_layers(compressed).items()}
    names = set(compressed.state_dict())
    config = RehabConfig(train=TrainConfig(steps=40, learning_rate=2e-3), method=method, lora_rank=4)
    result = rehab(
        compressed, TASK, training, config, held_out_loss=lambda m: loss_of(m, held_out), teacher=frozen_copy(model)
    )
    assert loss_of(compressed, held_out) < before
    assert loss_of(compressed, held_out) == min(part["held_out_loss"] for part in result.parts)
    assert {name: layer.rank for name, layer in low_rank_layers(compressed).items()} == ranks
    assert set(compressed.state_dict()) == names
    assert [row["step"] for row in result.history] == list(range(40))


@pytest.mark.parametrize("method", ["factors", "lora"])
def test_rehab_that_does_not_help_leaves_no_trace(method, digits):
    model, data, _ = digits
    compressed = truncated(model, data.train)
    before = {name: value.clone() for name, value in compressed.state_dict().items()}
    losses = iter([1.0, 2.0, 3.0])
    config = RehabConfig(train=TrainConfig(steps=4, learning_rate=0.5, distill=0.0), method=method)
    result = rehab(compressed, TASK, data.train, config, held_out_loss=lambda _: next(losses))
    assert not any(part["kept"] for part in result.parts[1:])
    assert all(torch.equal(value, before[name]) for name, value in compressed.state_dict().items())


def test_training_touches_only_what_it_is_given(digits):
    model, data, _ = digits
    own = copy.deepcopy(model)
    own.classifier.requires_grad_(False)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    train(own, TASK, data.train, TrainConfig(steps=2, distill=0.0), [own.vit.layers[0].mlp.fc1.weight])
    changed = [name for name, value in own.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["vit.layers.0.mlp.fc1.weight"]
    assert not own.classifier.weight.requires_grad
    assert own.vit.layers[1].mlp.fc1.weight.requires_grad


def test_a_diverging_run_says_what_to_change(digits):
    model, data, _ = digits
    own = copy.deepcopy(model)
    own.classifier.weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="learning rate"):
        train(own, TASK, data.train, TrainConfig(steps=1, distill=0.0), list(own.parameters()))
