"""Drift-anchored truncation: the walk through the blocks, the regression, and what it does for a whole model."""

from dataclasses import replace

import pytest
import torch
import transformers
from small_models import FAMILIES as FAMILY_CONFIGS
from small_models import build, logits
from torch import nn

from converters.lowrank import dense_weight
from converters.selection import select_layers
from prehab_export.compression import drift
from prehab_export.compression.block_walk import BlockWalk
from prehab_export.compression.blocks import NotAChain, find_blocks
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.calibration import calibrate
from prehab_export.compression.chain import Chain
from prehab_export.compression.dataflow import TokenRows
from prehab_export.compression.decompositions import decompose_layers
from prehab_export.compression.drift import RIDGE, _Fitter, _gather, truncate_along
from prehab_export.compression.model_walk import ModelWalk
from prehab_export.compression.planning import RankPlan, plan_ranks
from prehab_export.compression.recording import observe_layers
from prehab_export.compression.spool import USUAL_LIMITS, Folders, Spool
from prehab_export.compression.training import frozen_copy
from prehab_export.compression.truncation import truncate
from prehab_export.config.truncate import TruncateConfig
from prehab_export.inputs import tasks
from prehab_export.inputs.tasks import TASKS

TEXT, IMAGE, CLASSIFY = (TASKS[n] for n in ("text-generation", "image-classification", "text-classification"))
FAMILIES = {"llama": TEXT, "gpt2": TEXT, "opt": TEXT, "qwen2": TEXT, "bert": CLASSIFY, "vit": IMAGE}
STRONG = TruncateConfig(ratio=0.7)


def batches_for(task, count=6, size=8, padded=False):
    generator = torch.Generator().manual_seed(3)
    result = []
    for _ in range(count):
        labels = torch.randint(0, 2, (size,), generator=generator)
        if task is IMAGE:
            result.append({"pixel_values": torch.randn(size, 3, 16, 16, generator=generator), "labels": labels})
            continue
        batch = {"input_ids": torch.randint(2, 50, (size, 12), generator=generator)}
        if task is CLASSIFY:
            lengths = torch.randint(4, 12, (size, 1), generator=generator) if padded else torch.full((size, 1), 12)
            mask = (torch.arange(12) < lengths).long()
            batch |= {"input_ids": batch["input_ids"].masked_fill(mask == 0, 1), "attention_mask": mask}
            batch |= {"labels": labels}
        result.append(batch)
    return result


def prepared(family, padded=False, config=STRONG):
    task, model = FAMILIES[family], build(family)
    batches, layers = batches_for(task, padded=padded), select_layers(model)
    statistics = calibrate(model, task, batches, layers).statistics
    return model, task, batches, layers, statistics, truncate(Calibrated(model, task, statistics), config)


def along(model, task, batches, layers, statistics, plan, limits=USUAL_LIMITS):
    calibrated, shrinkage = Calibrated(model, task, statistics), STRONG.gradient_shrinkage
    return truncate_along(calibrated, batches, plan, gradient_shrinkage=shrinkage, folders=Folders(limits=limits))


def divergence(model, other, task, batches):
    with torch.no_grad():
        rows = [[task.unit_logits(task.logits(m, b), b).log_softmax(-1) for m in (other, model)] for b in batches]
    return sum(nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item() for q, p in rows) / len(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_meets_the_model_itself(family):
    """Block by block it sees the inputs that a whole pass gives each layer, and ends at the same states."""
    model, task, batches, layers, *_ = prepared(family)
    blocks = find_blocks(model, layers)
    expected, outputs = {}, {}
    handles = [
        layer.register_forward_hook(lambda _m, args, _o, name=name: expected.__setitem__(name, args[0]))
        for name, layer in layers.items()
    ]
    handles += [
        model.get_submodule(block.name).register_forward_hook(
            lambda _m, _a, out, name=block.name: outputs.__setitem__(name, out[0] if isinstance(out, tuple) else out)
        )
        for block in blocks
    ]
    with torch.no_grad():
        task.logits(model, batches[-1])
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        walk = BlockWalk(Chain.of(model, task, batches[0], layers), frozen_copy(model), batches, Spool())
        for block in blocks:
            assert sorted(walk.order[block.name]) == sorted(block.layers)
            walk.run_dense(block, [[name] for name in block.layers])
            for name in block.layers:
                *_, ((dense,), (student,), _mask, _positions) = walk.observe(block, [name])
                if name in dense.outputs:  # written to a residual stream: the output stands for the input
                    torch.testing.assert_close(dense.outputs[name], layers[name](expected[name]))
                else:
                    torch.testing.assert_close(dense.input, expected[name])
                torch.testing.assert_close(student.input, expected[name])
            walk.advance(block)
            torch.testing.assert_close(walk.dense_states[-1].load(), outputs[block.name])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_is_found_without_names(family):
    """For the last layer of a block before a norm, output + residual is what comes next; q and k have none."""
    model, task, batches, layers, *_ = prepared(family)
    blocks = find_blocks(model, layers)
    with torch.no_grad():
        walk = BlockWalk(Chain.of(model, task, batches[0], layers), frozen_copy(model), batches, Spool())
        block, writers = blocks[0], []
        walk.run_dense(block, [[name] for name in walk.order[block.name]])
        for name in walk.order[block.name]:
            *_, ((dense,), *_rest) = walk.observe(block, [name])
            if name in dense.residuals:
                writers.append(name)
                last = dense.residuals[name] + dense.outputs[name]
        walk.advance(block)
    assert len(writers) == 2  # attention's output projection, and the MLP's
    assert writers[-1] == walk.order[block.name][-1]
    if family == "bert":  # the norm comes after the sum
        with torch.no_grad():
            last = model.get_submodule(block.name).output.LayerNorm(last)
    torch.testing.assert_close(walk.dense_states[-1].load().flatten(0, -2), last.flatten(0, -2))


class ChannelsFirst(nn.Module):
    """A block of a convolutional network: the linear has channels last, the stream has them after the batch."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        inner = torch.relu(self.narrow(x.permute(0, 2, 3, 1)))
        return x + self.wide(inner).permute(0, 3, 1, 2)


def test_the_residual_stream_lies_as_the_layer_gives_its_output():
    """Sixteen channels of 16×16: a wrong order of axes has the right shape."""
    torch.manual_seed(0)
    block, x = ChannelsFirst(), torch.randn(2, 16, 16, 16)
    rows = TokenRows((2, 16))
    with torch.no_grad():
        ((seen,),) = observe_layers([{"wide": block.wide}], rows, lambda: block(x))
        expected = block(x)
    torch.testing.assert_close(seen.residuals["wide"], x.permute(0, 2, 3, 1))
    found = seen.residuals["wide"] + block.wide(seen.input)
    torch.testing.assert_close(found.permute(0, 3, 1, 2), expected)


HIERARCHIES = {
    "convnextv2": transformers.ConvNextV2Config(
        num_stages=2, hidden_sizes=[16, 32], depths=[2, 2], patch_size=2, num_labels=3
    ),
    "segformer": transformers.SegformerConfig(
        hidden_sizes=[16, 32],
        depths=[2, 2],
        num_encoder_blocks=2,
        num_attention_heads=[1, 2],
        sr_ratios=[2, 1],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
        num_labels=3,
    ),
    "swin": transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=3
    ),
}


@pytest.mark.parametrize("family", HIERARCHIES)
def test_drift_is_corrected_where_there_are_fewer_tokens_in_every_stage(family):
    torch.manual_seed(0)
    model = transformers.AutoModelForImageClassification.from_config(HIERARCHIES[family]).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    batches, layers = batches_for(IMAGE), select_layers(model)
    statistics = calibrate(model, IMAGE, batches, layers).statistics
    plan = truncate(Calibrated(model, IMAGE, statistics), STRONG)
    result = along(model, IMAGE, batches, layers, statistics, plan)
    assert not [note for note in result.notes if "other tokens" in note]
    plain, corrected = plan.apply(frozen_copy(model)), result.apply(frozen_copy(model))
    assert divergence(model, corrected, IMAGE, batches) < divergence(model, plain, IMAGE, batches)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_first_layers_are_those_of_plain_truncation(family):
    """Nothing before them is compressed, so x' = x, W* = W, and the plan's factors are the answer already."""
    uniform = replace(STRONG, allocation="uniform")
    model, task, batches, layers, statistics, plan = prepared(family, padded=family == "bert", config=uniform)
    result = along(model, task, batches, layers, statistics, plan)
    first = next(iter(layers))
    expected, found = plan.factors[first], result.factors[first]
    torch.testing.assert_close(found.up @ found.down, expected.up @ expected.down, rtol=1e-4, atol=1e-5)
    if expected.bias is not None:
        torch.testing.assert_close(found.bias, expected.bias, rtol=1e-4, atol=1e-5)


def test_a_layer_that_stays_dense_is_the_ridge_regression_on_its_inputs():
    """Against a float64 least-squares solution of the augmented system; the stream's drift is in the target."""
    model, task, batches, layers, statistics, plan = prepared("llama")
    last = list(layers)[-1]
    kept = [result for result in plan.layers if result.name != last]
    dense_last = next(result for result in plan.layers if result.name == last)
    plan = replace(
        plan,
        factors={name: pair for name, pair in plan.factors.items() if name != last},
        layers=[*kept, replace(dense_last, rank=None)],
    )
    result = along(model, task, batches, layers, statistics, plan)
    student = result.apply(frozen_copy(model))
    seen = {}
    for which, one in (("dense", model), ("student", student)):
        block, layer = one.model.layers[-1], one.get_submodule(last)
        handles = [
            layer.register_forward_hook(
                lambda _m, a, o, w=which: seen.setdefault(w, []).append([a[0].double(), o.double()])
            ),
            block.register_forward_hook(lambda _m, _a, o, w=which: seen[w][-1].append(o.double())),
        ]
        with torch.no_grad():
            for batch in batches:
                task.logits(one, batch)
        for handle in handles:
            handle.remove()

    def rows(which, pick):
        return torch.cat([pick(entry).flatten(0, 1) for entry in seen[which]])

    own = rows("student", lambda e: e[0])
    stream = rows("dense", lambda e: e[2] - e[1]) - rows("student", lambda e: e[2] - e[1])
    target = rows("dense", lambda e: e[1]) + stream
    w = dense_weight(layers[last]).detach().double()
    ridge = (RIDGE * own.square().mean(0).mean() * len(own)).sqrt()
    system = torch.cat([own, ridge * torch.eye(own.shape[1], dtype=torch.float64)])
    solution = torch.linalg.lstsq(system, torch.cat([target, ridge * w.T])).solution.T
    assert (result.refits[last].weight - solution).norm() < 1e-3 * solution.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_compressed_model_comes_closer_to_the_dense_one(family):
    model, task, batches, layers, statistics, plan = prepared(family, padded=True)
    result = along(model, task, batches, layers, statistics, plan)
    assert result.ranks == plan.ranks
    plain, corrected = plan.apply(frozen_copy(model)), result.apply(frozen_copy(model))
    assert divergence(model, corrected, task, batches) < divergence(model, plain, task, batches)


CLASSIFIERS = {
    "llama": transformers.LlamaForSequenceClassification,
    "qwen2": transformers.Qwen2ForSequenceClassification,
    "gpt2": transformers.GPT2ForSequenceClassification,
}


def classifier(family, **changes):
    """A classifier on a decoder, whose token 1 is padding."""
    model_class, config = CLASSIFIERS[family], FAMILY_CONFIGS[family][1]
    torch.manual_seed(0)
    changes = {"pad_token_id": 1, "num_labels": 2, **changes}
    return model_class._from_config(type(config)(**{**config.to_dict(), **changes})).eval()


def by_whole_passes(model, task, batches, layers, statistics, plan):
    """The slow way round: both models are run from end to end for every input of layers; nothing is run by itself."""
    student, walk = frozen_copy(model), ModelWalk(model, task, batches, list(layers))
    fitter, factors = _Fitter(Calibrated(model, task, statistics), plan, STRONG.gradient_shrinkage), {}
    with torch.no_grad():
        for members in fitter.by_input(walk.order):
            part = fitter.fit(members, _gather(walk.observe(student, members), members))
            part.apply(student)
            factors |= part.factors
    return factors


def assert_same_products(found, expected):
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        product = pair.up.double() @ pair.down.double()
        own = found[name].up.double() @ found[name].down.double()
        assert (own - product).norm() < 1e-3 * product.norm(), name


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_classifiers_on_decoders_get_the_factors_of_whole_passes(family, padded, cached, monkeypatch):
    """Whether their forward pass can be kept from filling a cache or not: blocks are run again, caches are not."""
    if cached:
        monkeypatch.setattr(tasks, "_without_cache", lambda _model: {})
    model, batches = classifier(family), batches_for(CLASSIFY, count=3, padded=padded)
    layers = select_layers(model)
    statistics = calibrate(model, CLASSIFY, batches, layers).statistics
    plan = truncate(Calibrated(model, CLASSIFY, statistics), STRONG)
    result = along(model, CLASSIFY, batches, layers, statistics, plan)
    assert not result.notes
    assert_same_products(result.factors, by_whole_passes(model, CLASSIFY, batches, layers, statistics, plan))


@pytest.mark.parametrize("family", FAMILIES)
def test_other_models_get_the_factors_of_whole_passes_too(family):
    model, task, batches, layers, statistics, plan = prepared(family, padded=True)
    result = along(model, task, batches, layers, statistics, plan)
    assert_same_products(result.factors, by_whole_passes(model, task, batches, layers, statistics, plan))


def test_layers_that_share_their_down_go_on_sharing_it():
    """And fit at least as well as any other choice at that rank: the objective is that of the joint decomposition."""
    model, task, batches, layers, statistics, _ = prepared("llama")
    decomposed = decompose_layers(Calibrated(model, task, statistics), STRONG)
    group = next(iter(decomposed.groups))
    ranks = plan_ranks(Calibrated(model, task, statistics), decomposed, replace(STRONG, allocation="uniform")).ranks
    shared = RankPlan({**ranks, **dict.fromkeys(group, 5)}, (group,))
    plan = truncate(Calibrated(model, task, statistics), STRONG, decomposed=decomposed, plan=shared)
    result = along(model, task, batches, layers, statistics, plan)
    assert result.shared == (group,)
    downs = [result.factors[name].down for name in group]
    assert all(down is downs[0] for down in downs)
    assert downs[0].shape[0] == 5
    for name in group:  # of the first block: nothing before it has drifted
        expected, found = plan.factors[name], result.factors[name]
        torch.testing.assert_close(found.up @ found.down, expected.up @ expected.down, rtol=1e-3, atol=1e-4)
    plain, corrected = plan.apply(frozen_copy(model)), result.apply(frozen_copy(model))
    assert divergence(model, corrected, task, batches) < divergence(model, plain, task, batches)


def test_padding_does_not_count():
    model, task, batches, layers, statistics, plan = prepared("bert", padded=True)
    longer = [
        {
            "input_ids": nn.functional.pad(batch["input_ids"], (0, 5), value=7),
            "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 5)),
            "labels": batch["labels"],
        }
        for batch in batches
    ]
    one = along(model, task, batches, layers, statistics, plan)
    two = along(model, task, longer, layers, statistics, plan)
    for name, pair in one.factors.items():
        other = two.factors[name]
        product = pair.up @ pair.down
        assert (product - other.up @ other.down).norm() < 1e-2 * product.norm()


def test_the_dense_model_is_left_alone():
    model, task, batches, layers, statistics, plan = prepared("gpt2")
    before, flags = logits(model), [p.requires_grad for p in model.parameters()]
    along(model, task, batches, layers, statistics, plan)
    assert torch.equal(before, logits(model))
    assert [p.requires_grad for p in model.parameters()] == flags


def albert(**changes):
    """One block, run four times; its sizes are those of the other families."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.AlbertConfig(
        **{**sizes, "vocab_size": 50, "embedding_size": 16, "initializer_range": 0.2, **changes}
    )
    return transformers.AlbertForSequenceClassification(config).eval()


class Twice(nn.Module):
    """Blocks in no list, one of which is run twice, and a linear that is run twice inside it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 2)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        for layer in (self.first, self.second, self.head):
            nn.init.normal_(layer.weight, std=0.5)

    def forward(self, input_ids, attention_mask, **_others):
        x = self.embed(input_ids)
        for _ in range(2):
            x = x + self.second(torch.tanh(self.first(x)))
        x = x + self.first(x)
        pooled = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.head(pooled))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (albert, "1 blocks were run 4 times"),
        (lambda: albert(num_hidden_groups=2), "2 blocks were run 4 times"),
        (Twice, "no list of blocks"),
    ],
)
def test_layers_that_run_many_times_are_fitted_to_all_their_runs(make, why):
    """And the model comes closer to the dense one for it, on the sample, in the divergence that it is judged by."""
    model, batches = make(), batches_for(CLASSIFY, count=3, size=12, padded=True)
    layers = select_layers(model, include=["first", "second"] if make is Twice else ())
    statistics = calibrate(model, CLASSIFY, batches, layers).statistics
    plan = truncate(Calibrated(model, CLASSIFY, statistics), STRONG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = along(model, CLASSIFY, batches, layers, statistics, plan)
    plain, corrected = plan.apply(frozen_copy(model)), result.apply(frozen_copy(model))
    assert divergence(model, corrected, CLASSIFY, batches) < 0.9 * divergence(model, plain, CLASSIFY, batches)
    assert result.ranks == plan.ranks
    assert why in result.notes[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_moments_of_a_layer_that_runs_many_times_are_those_of_all_its_runs():
    model, batches = albert(), batches_for(CLASSIFY, count=2, padded=True)
    layers = select_layers(model)
    name = next(name for name in layers if name.endswith("ffn"))
    rows, layer = [], model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _m, args: rows.append(args[0].double()))
    with torch.no_grad():
        for batch in batches:
            CLASSIFY.logits(model, batch)
        masks = [batch["attention_mask"].bool() for batch in batches for _ in range(4)]
        together = torch.cat([x[mask] for x, mask in zip(rows, masks, strict=True)])
        handle.remove()
        walk = ModelWalk(model, CLASSIFY, batches, list(layers))
        sums = _gather(walk.observe(frozen_copy(model), [name]), [name])
    assert sums.tokens == len(together)
    torch.testing.assert_close(sums.outer, together.T @ together, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sums.cross, sums.outer)


def test_too_many_whole_passes_are_not_made(monkeypatch):
    monkeypatch.setattr(drift, "MOST_INPUTS", 3)
    model, batches = albert(), batches_for(CLASSIFY, count=2)
    layers = select_layers(model)
    statistics = calibrate(model, CLASSIFY, batches, layers).statistics
    plan = truncate(Calibrated(model, CLASSIFY, statistics), STRONG)
    with pytest.raises(NotAChain, match=r"1 blocks were run 4 times .* 4 inputs"):
        along(model, CLASSIFY, batches, layers, statistics, plan)


def test_what_is_left_as_planned_is_told():
    model, task, batches, *_ = prepared("bert")
    layers = select_layers(model, include=["bert.encoder.*.query", "bert.pooler.dense"])
    statistics = calibrate(model, task, batches, layers).statistics
    result = along(model, task, batches, layers, statistics, truncate(Calibrated(model, task, statistics), STRONG))
    assert result.notes == ("drift is not corrected for bert.pooler.dense, outside the repeated blocks",)


def test_layers_outside_every_block_are_cut_as_planned():
    model, task, batches, *_ = prepared("bert")
    layers = select_layers(model, include=["bert.pooler.dense"])
    statistics = calibrate(model, task, batches, layers).statistics
    plan = truncate(Calibrated(model, task, statistics), STRONG)
    result = along(model, task, batches, layers, statistics, plan)
    assert torch.equal(result.factors["bert.pooler.dense"].up, plan.factors["bert.pooler.dense"].up)


def test_blocks_that_are_no_chain_are_refused():

    model, task, batches, layers, _statistics, _plan = prepared("llama")
    model.model.layers[1].register_forward_pre_hook(lambda _m, args: (args[0] * 1.5, *args[1:]))
    with pytest.raises(NotAChain, match=r"layers\.1"):
        Chain.of(model, task, batches[0], layers)
