"""Moments against brute force: autograd per unit, float64 sums, padding cut away by hand."""

import math
from dataclasses import replace

import pytest
import torch
import transformers

from converters.errors import InputError
from converters.selection import select_layers
from prehab_export.compression import calibration
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.calibration import CalibrationWarning, Gather, calibrate
from prehab_export.compression.doubts_of_moments import few_tokens
from prehab_export.compression.input_groups import shared_inputs
from prehab_export.compression.metric import gradient_metric
from prehab_export.compression.moment_files import load_statistics, save_statistics
from prehab_export.compression.moments import InputMoment, Statistics
from prehab_export.compression.sample_size import needed_samples
from prehab_export.compression.truncation import truncate
from prehab_export.config.truncate import TruncateConfig
from prehab_export.inputs.tasks import TASKS
from prehab_export.linalg.shrinkage import ClusterSums, Sampling, shrunk


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


class WithUnusedParts(torch.nn.Module):
    """A BERT beside a tower that never runs and one whose output goes nowhere."""

    def __init__(self):
        super().__init__()
        self.text = bert()
        self.vision_tower = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(4)])
        self.idle = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(2)])

    def forward(self, input_ids, attention_mask):
        for layer in self.idle:
            layer(torch.ones(len(input_ids), 16))
        return self.text(input_ids=input_ids, attention_mask=attention_mask)


def test_all_layers_that_never_run_are_left_out_by_one_pattern():
    model, task = WithUnusedParts(), TASKS["text-classification"]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    with pytest.raises(InputError, match=r"vision_tower\.0 and 3 more layers .* --exclude 'vision_tower\.\*'$"):
        calibrate(model, task, batches(), layers)
    layers = {name: layer for name, layer in layers.items() if not name.startswith("vision_tower")}
    with pytest.raises(InputError, match=r"loss does not depend on idle\.0 and 1 more layer .* 'idle\.\*'$"):
        calibrate(model, task, batches(), layers)
    layers = {name: layer for name, layer in layers.items() if not name.startswith("idle")}
    calibrate(model, task, batches(), layers)


def test_layers_that_keep_no_gradients_are_refused_and_do_without():
    """A Reformer's layers are reversible: what their backward pass needs is computed anew."""
    torch.manual_seed(0)
    config = transformers.ReformerConfig(
        vocab_size=40,
        hidden_size=16,
        num_attention_heads=2,
        attention_head_size=8,
        feed_forward_size=24,
        attn_layers=["local", "local"],
        axial_pos_embds=False,
        local_attn_chunk_length=4,
        is_decoder=False,
        max_position_embeddings=32,
    )
    model, task = transformers.ReformerForSequenceClassification(config).eval(), TASKS["text-classification"]
    layers = select_layers(model)
    with pytest.raises(InputError, match=r"without keeping what gradients need .* --objective activation"):
        calibrate(model, task, batches(), layers)
    statistics = calibrate(model, task, batches(), layers, gather=Gather(gradients=False)).statistics
    assert set(statistics.groups) == set(layers)


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
    layers = select_layers(model)
    statistics = calibrate(model, task, samples, layers).statistics
    for name in layers:
        c, mean, g = brute_force(model, task, samples, name)
        moment = statistics.input_of(name)
        assert torch.allclose(moment.second_moment.double(), c, atol=1e-6)
        assert torch.allclose(moment.mean.double(), mean, atol=1e-6)
        assert torch.allclose(statistics.gradients[name].double(), g, rtol=1e-4, atol=1e-7 * float(g.abs().max() + 1))
        assert moment.tokens == sum(int(batch["attention_mask"].sum()) for batch in samples)


def test_batching_does_not_matter():
    model, task = bert(), TASKS["text-classification"]
    layers = select_layers(model)
    whole = calibrate(model, task, batches(), layers).statistics
    single = [
        {key: value[row : row + 1] for key, value in batch.items()}
        for batch in batches()
        for row in range(len(batch["labels"]))
    ]
    parts = calibrate(model, task, single, layers).statistics
    for name in layers:
        assert torch.allclose(whole.gradients[name], parts.gradients[name], rtol=1e-3, atol=1e-8)
        assert torch.allclose(whole.input_of(name).second_moment, parts.input_of(name).second_moment, atol=1e-6)


def test_layers_with_one_input_share_one_moment():
    for model, groups in ((bert(), 4), (llama(), 4)):
        layers = select_layers(model)
        task = TASKS["text-generation" if "Causal" in type(model).__name__ else "text-classification"]
        found = shared_inputs(model, task, batches()[0], layers)
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
    calibrate(model, TASKS["text-classification"], batches(), select_layers(model))
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.bert.embeddings.parameters())
    assert all(parameter.requires_grad for parameter in model.classifier.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_labels_drawn_from_the_model_need_none_and_repeat():
    model, task = llama(), TASKS["text-generation"]
    layers = select_layers(model)
    samples = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches()]
    first = calibrate(model, task, samples, layers, gather=Gather(labels="model"), seed=3).statistics
    again = calibrate(model, task, samples, layers, gather=Gather(labels="model"), seed=3).statistics
    other = calibrate(model, task, samples, layers, gather=Gather(labels="model"), seed=4).statistics
    name = next(iter(layers))
    assert torch.equal(first.gradients[name], again.gradients[name])
    assert not torch.equal(first.gradients[name], other.gradients[name])


def test_statistics_round_trip(tmp_path):
    model = bert()
    statistics = calibrate(model, TASKS["text-classification"], batches(), select_layers(model)).statistics
    save_statistics(statistics, tmp_path / "moments")
    loaded = load_statistics(tmp_path / "moments")
    assert loaded.groups == statistics.groups
    assert loaded.units == statistics.units == 5
    for group, moment in statistics.inputs.items():
        assert torch.equal(loaded.inputs[group].second_moment, moment.second_moment)
        assert torch.equal(loaded.inputs[group].mean, moment.mean)
        assert loaded.inputs[group].tokens == moment.tokens
        assert loaded.inputs[group].sampling == moment.sampling
    assert loaded.gradient_sampling == statistics.gradient_sampling
    assert all(torch.equal(loaded.gradients[name], value) for name, value in statistics.gradients.items())


def test_few_tokens_are_a_warning_with_the_effective_number():
    model, task = bert(), TASKS["text-classification"]
    layers = select_layers(model)
    with pytest.warns(
        CalibrationWarning, match=r"1 samples, 3 tokens\) is worth 3 independent tokens for the 24 .* few for 7 more"
    ):
        calibrate(model, task, batches(((3,),)), layers)
    enough = calibrate(model, task, batches(((9,) * 64,)), layers).statistics
    assert few_tokens(enough) is None
    one = enough.inputs[next(iter(enough.inputs))]
    poor = replace(one, sampling=replace(one.sampling, error=one.sampling.token_error / 2))
    message = few_tokens(replace(enough, inputs={"fc": poor}))
    assert message is not None
    assert "is worth 2 independent tokens for the 16 inputs of fc;" in message


def rows_by_sample(model, task, samples, name):
    """Inputs and output gradients of one layer, one tensor a sample, padding cut away."""
    layer, inputs, gradients = model.get_submodule(name), [], []
    for batch in samples:
        for row in range(len(batch["input_ids"])):
            length = int(batch["attention_mask"][row].sum())
            one = {key: value[row : row + 1, :length] for key, value in batch.items() if key != "labels"}
            one |= {"labels": batch["labels"][row : row + 1]} if "labels" in batch else {}
            seen = {}
            handle = layer.register_forward_hook(lambda _m, args, out, seen=seen: seen.update(x=args[0], y=out))
            losses = task.losses(task.logits(model, one), one)
            handle.remove()
            (gradient,) = torch.autograd.grad(losses.sum(), seen["y"])
            inputs.append(seen["x"].detach().reshape(-1, seen["x"].shape[-1]).double())
            gradients.append((gradient.reshape(-1, gradient.shape[-1]).double(), len(losses)))
    return inputs, gradients


def relative_error(samples, sizes):
    outers = [rows.T @ rows for rows in samples]
    moment = sum(outers) / sum(sizes)
    spread = sum(float((s - n * moment).square().sum()) for s, n in zip(outers, sizes, strict=True))
    return len(samples) / (len(samples) - 1) * spread / sum(sizes) ** 2 / float(moment.square().sum())


@pytest.mark.parametrize(("make", "task"), [(bert, "text-classification"), (llama, "text-generation")])
def test_sampling_error_equals_brute_force(make, task):
    """With tokens that outnumber the features and with few of them: both ways to ‖S_i‖."""
    model, task = make(), TASKS[task]
    samples = batches(((9, 3, 12, 3), (2, 3, 4, 3, 2)))
    if task.metric == "perplexity":
        samples = [{key: value for key, value in batch.items() if key != "labels"} for batch in samples]
    layers = select_layers(model)
    statistics = calibrate(model, task, samples, layers).statistics
    for name in layers:
        inputs, gradients = rows_by_sample(model, task, samples, name)
        # Centred on the first batch: the mean of the first four samples.
        shift = torch.cat(inputs[:4]).mean(0)
        centred = [rows - shift for rows in inputs]
        expected = relative_error(centred, [len(rows) for rows in centred])
        assert statistics.input_of(name).sampling.error == pytest.approx(expected, rel=1e-3)
        expected = relative_error(*zip(*gradients, strict=True))
        assert statistics.gradient_sampling[name].error == pytest.approx(expected, rel=1e-3)
        assert statistics.gradient_sampling[name].samples == 9


def test_tensors_with_rows_flattened_and_rubbish_in_the_padding():
    """A layer that sees (B·T, d), one that sees (B, d), and NaN where there is no token."""

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.flat, self.head = torch.nn.Embedding(40, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)

        def forward(self, input_ids, attention_mask):
            x = self.embed(input_ids).masked_fill(attention_mask[..., None] == 0, float("nan"))
            y = self.flat(x.reshape(-1, 6)).reshape(x.shape)
            pooled = torch.where(attention_mask[..., None] == 1, y, 0).sum(1)
            return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.head(pooled))

    torch.manual_seed(0)
    model, samples = Flat(), batches(((5, 3, 4), (7, 7, 2)))
    layers = {"flat": model.flat, "head": model.head}
    statistics = calibrate(model, TASKS["text-classification"], samples, layers).statistics
    rows = [
        model.embed(ids[mask.bool()]).detach().double()
        for batch in samples
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    together = torch.cat(rows)
    moment = statistics.inputs["flat"]
    assert torch.allclose(moment.second_moment.double(), together.T @ together / len(together), atol=1e-5)
    shift = torch.cat(rows[:3]).mean(0)
    expected = relative_error([own - shift for own in rows], [len(own) for own in rows])
    assert moment.sampling.error == pytest.approx(expected, rel=1e-3)
    assert statistics.inputs["head"].tokens == statistics.inputs["head"].sampling.samples == 6


def test_a_running_average():
    model, task = bert(), TASKS["text-classification"]
    layers = select_layers(model)
    first = calibrate(model, task, batches(), layers).statistics
    second = calibrate(model, task, batches(seed=1), layers, gather=Gather(sampling=False)).statistics
    both = first.blended(second, 0.5)
    name = next(iter(both.gradients))
    assert torch.allclose(both.gradients[name], 0.5 * (first.gradients[name] + second.gradients[name]))
    assert both.gradient_sampling == first.gradient_sampling
    assert both.inputs[name].sampling == first.inputs[name].sampling


@pytest.mark.filterwarnings("error::prehab_export.compression.calibration.CalibrationWarning")
def test_moments_without_their_sampling_are_the_same():
    model, task = bert(), TASKS["text-classification"]
    layers = select_layers(model)
    with pytest.warns(CalibrationWarning):
        known = calibrate(model, task, batches(), layers).statistics
    plain = calibrate(model, task, batches(), layers, gather=Gather(sampling=False)).statistics
    for group, moment in known.inputs.items():
        assert torch.allclose(plain.inputs[group].second_moment, moment.second_moment, rtol=1e-5, atol=1e-6)
        assert plain.inputs[group].tokens == moment.tokens
        assert math.isnan(plain.inputs[group].sampling.error)
    for name, gradient in known.gradients.items():
        assert torch.allclose(plain.gradients[name], gradient, rtol=1e-4, atol=1e-9)


@pytest.mark.filterwarnings("ignore::prehab_export.compression.calibration.CalibrationWarning")
@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_moments_without_their_sampling_are_shrunk_as_configured_and_no_further(floor, tmp_path):
    """What is not known is no reason to give up G: factors are those of G at the configured share, saved or not."""
    model, task = bert(), TASKS["text-classification"]
    layers, config = select_layers(model), TruncateConfig(ratio=0.6, gradient_shrinkage=floor)
    plain = calibrate(model, task, batches(), layers, gather=Gather(sampling=False)).statistics
    save_statistics(plain, tmp_path / "moments")
    exact = {name: Sampling(5, 0.0, 1.0) for name in layers}
    expected = truncate(Calibrated(model, task, replace(plain, gradient_sampling=exact)), config)
    for statistics in (plain, load_statistics(tmp_path / "moments")):
        found = truncate(Calibrated(model, task, statistics), config)
        assert found.ranks == expected.ranks
        for name, pair in found.factors.items():
            assert torch.equal(pair.up, expected.factors[name].up)
            metric = gradient_metric(name, layers[name], statistics, floor)
            assert metric is not None
            assert torch.allclose(metric, shrunk(plain.gradients[name], floor))
    assert few_tokens(plain) is None
    assert all(moment.sampling.effective_tokens is None for moment in plain.inputs.values())


def test_bad_input():
    model, task = bert(), TASKS["text-classification"]
    layers = select_layers(model)
    with pytest.raises(InputError, match="empty"):
        calibrate(model, task, [], layers)
    with pytest.raises(InputError, match="Fisher labels"):
        calibrate(model, task, batches(), layers, gather=Gather(labels="guess"))
    model.bert.encoder.layer[1].attention.self.query.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"encoder\.layer\.1.*NaN"):
        calibrate(model, task, batches(), layers)


@pytest.mark.parametrize("copies", [1, 4])
def test_the_samples_needed_follow_from_what_a_token_is_worth(copies):
    """Tokens that are drawn independently are worth one each, and those that are repeated are worth none."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 8, 16, generator=generator).repeat_interleave(copies, dim=1)
    sums = ClusterSums()
    sums.add(rows, torch.ones(400, 8 * copies, dtype=torch.bool), torch.full((400,), 8 * copies))
    second = sums.outer / sums.rows
    moment = InputMoment(second, torch.zeros(16), sums.rows, sums.sampling())
    wide = InputMoment(torch.eye(64), torch.zeros(64), 10, Sampling(10, float("nan"), float("nan")))
    statistics = Statistics({"a": moment, "unknown": wide}, {"a": "a", "unknown": "unknown"})
    assert needed_samples(statistics) == pytest.approx(16 / 8, abs=1)


@pytest.mark.parametrize("by_blocks", [True, False])
def test_gradients_are_those_of_the_first_units(by_blocks, monkeypatch):
    """Inputs are those of all samples. A sample is differentiated as a whole, however it lies in a batch."""
    if not by_blocks:
        monkeypatch.setattr(calibration, "_chain", lambda *_: None)
    torch.manual_seed(0)
    model, task = llama(), TASKS["text-generation"]
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 40, (6, 9), generator=generator)
    batches = [{"input_ids": ids[:4]}, {"input_ids": ids[4:]}]
    every = calibrate(model, task, batches).statistics
    for units, samples in ((1, 1), (8, 1), (9, 2), (33, 5), (48, 6), (500, 6)):
        expected = calibrate(model, task, [{"input_ids": ids[:samples]}]).statistics
        found = calibrate(model, task, batches, gather=Gather(gradient_units=units)).statistics
        assert found.units == expected.units == 8 * samples
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-4, atol=1e-9)
            assert found.gradient_sampling[name].samples == samples
        for group, moment in every.inputs.items():
            torch.testing.assert_close(found.inputs[group].second_moment, moment.second_moment, rtol=1e-4, atol=1e-6)
            assert found.inputs[group].tokens == moment.tokens
