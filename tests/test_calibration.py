"""Moments against brute force: autograd per unit, float64 sums, padding cut away by hand."""

import pytest
import torch
import transformers

from converters.errors import InputError
from converters.targets import target_layers
from prehab_export.calibration import CalibrationWarning, calibrate, shared_inputs
from prehab_export.statistics import load_statistics, save_statistics
from prehab_export.tasks import TASKS


def bert(**changes):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **changes
    )
    return transformers.BertForSequenceClassification(config).eval()


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
    )
    return transformers.LlamaForCausalLM(config).eval()


def batches(lengths=((5, 3), (7, 7, 2)), seed=0):
    """Batches of token ids with right padding."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for batch in lengths:
        ids = torch.randint(1, 40, (len(batch), max(batch)), generator=generator)
        mask = torch.tensor([[int(at < length) for at in range(max(batch))] for length in batch])
        labels = torch.randint(0, 2, (len(batch),), generator=generator)
        result.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return result


def brute_force(model, task, samples, name):
    """C, μ and G of one layer, sample by sample, without padding and in float64."""
    layer = model.get_submodule(name)
    inputs, gradients, units = [], [], 0
    for batch in samples:
        for row in range(len(batch["input_ids"])):
            length = int(batch["attention_mask"][row].sum())
            one = {"input_ids": batch["input_ids"][row : row + 1, :length]}
            one["attention_mask"] = torch.ones_like(one["input_ids"])
            if task.metric == "accuracy":
                one["labels"] = batch["labels"][row : row + 1]
            seen = {}
            handle = layer.register_forward_hook(lambda _m, args, out, seen=seen: seen.update(x=args[0], y=out))
            losses = task.losses(task.logits(model, one), one)
            handle.remove()
            (gradient,) = torch.autograd.grad(losses.sum(), seen["y"])
            inputs.append(seen["x"].detach().reshape(length, -1).double())
            gradients.append(gradient.reshape(length, -1).double())
            units += len(losses)
    x, g = torch.cat(inputs), torch.cat(gradients)
    return x.T @ x / len(x), x.mean(0), g.T @ g / units


@pytest.mark.parametrize(("make", "task"), [(bert, "text-classification"), (llama, "text-generation")])
def test_moments_equal_brute_force_without_padding(make, task):
    model, task = make(), TASKS[task]
    samples = batches()
    if task.metric == "perplexity":
        samples = [{key: value for key, value in batch.items() if key != "labels"} for batch in samples]
    layers = target_layers(model)
    statistics = calibrate(model, samples, task, layers)
    for name in layers:
        c, mean, g = brute_force(model, task, samples, name)
        moment = statistics.input_of(name)
        assert torch.allclose(moment.second_moment.double(), c, atol=1e-6)
        assert torch.allclose(moment.mean.double(), mean, atol=1e-6)
        assert torch.allclose(statistics.gradients[name].double(), g, rtol=1e-4, atol=1e-7 * float(g.abs().max() + 1))
        assert moment.tokens == sum(int(batch["attention_mask"].sum()) for batch in samples)


def test_batching_does_not_matter():
    model, task = bert(), TASKS["text-classification"]
    layers = target_layers(model)
    whole = calibrate(model, batches(), task, layers)
    single = [
        {key: value[row : row + 1] for key, value in batch.items()}
        for batch in batches()
        for row in range(len(batch["labels"]))
    ]
    parts = calibrate(model, single, task, layers)
    for name in layers:
        assert torch.allclose(whole.gradients[name], parts.gradients[name], rtol=1e-3, atol=1e-8)
        assert torch.allclose(whole.input_of(name).second_moment, parts.input_of(name).second_moment, atol=1e-6)


def test_layers_with_one_input_share_one_moment():
    for model, groups in ((bert(), 4), (llama(), 4)):
        layers = target_layers(model)
        task = TASKS["text-generation" if "Causal" in type(model).__name__ else "text-classification"]
        found = shared_inputs(model, batches()[0], task, layers)
        per_block = {name: group for name, group in found.items() if ".0." in name}
        assert len(set(per_block.values())) == groups
        assert len(set(found.values())) == 2 * groups
        queries = [
            group for name, group in per_block.items() if name.endswith(("query", "key", "value", "q_proj", "k_proj"))
        ]
        assert len(set(queries)) == 1


def test_the_model_comes_back_as_it_was():
    model = bert().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.bert.embeddings.requires_grad_(False)
    calibrate(model, batches(), TASKS["text-classification"], target_layers(model))
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.bert.embeddings.parameters())
    assert all(parameter.requires_grad for parameter in model.classifier.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_labels_drawn_from_the_model_need_none_and_repeat():
    model, task = llama(), TASKS["text-generation"]
    layers = target_layers(model)
    samples = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches()]
    first = calibrate(model, samples, task, layers, labels="model", seed=3)
    again = calibrate(model, samples, task, layers, labels="model", seed=3)
    other = calibrate(model, samples, task, layers, labels="model", seed=4)
    name = next(iter(layers))
    assert torch.equal(first.gradients[name], again.gradients[name])
    assert not torch.equal(first.gradients[name], other.gradients[name])


def test_statistics_round_trip(tmp_path):
    model = bert()
    statistics = calibrate(model, batches(), TASKS["text-classification"], target_layers(model))
    save_statistics(statistics, tmp_path / "s.safetensors")
    loaded = load_statistics(tmp_path / "s.safetensors")
    assert loaded.groups == statistics.groups
    assert loaded.units == statistics.units == 5
    for group, moment in statistics.inputs.items():
        assert torch.equal(loaded.inputs[group].second_moment, moment.second_moment)
        assert torch.equal(loaded.inputs[group].mean, moment.mean)
        assert loaded.inputs[group].tokens == moment.tokens
    assert all(torch.equal(loaded.gradients[name], value) for name, value in statistics.gradients.items())


def test_few_tokens_are_a_warning_with_the_number():
    model = bert()
    with pytest.warns(CalibrationWarning, match=r"3 calibration tokens for the 16 inputs of .*\.0\..* and of 7 more"):
        calibrate(model, batches(((3,),)), TASKS["text-classification"], target_layers(model))


def test_bad_input():
    model, task = bert(), TASKS["text-classification"]
    layers = target_layers(model)
    with pytest.raises(InputError, match="empty"):
        calibrate(model, [], task, layers)
    with pytest.raises(InputError, match="Fisher labels"):
        calibrate(model, batches(), task, layers, labels="guess")
    model.bert.encoder.layer[1].attention.self.query.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"encoder\.layer\.1.*NaN"):
        calibrate(model, batches(), task, layers)
