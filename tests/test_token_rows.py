"""Which rows are tokens, and which token each is: followed through models, against every sample on its own."""

import pytest
import torch
import transformers
from test_calibration import batches
from test_drift import STRONG
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from converters.errors import InputError
from converters.selection import select_layers
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.calibration import calibrate
from prehab_export.compression.dataflow import TokenRows
from prehab_export.compression.drift import truncate_along
from prehab_export.compression.truncation import truncate
from prehab_export.inputs.tasks import TASKS

pytestmark = pytest.mark.filterwarnings("ignore::prehab_export.compression.calibration.CalibrationWarning")
CLASSIFY = TASKS["text-classification"]
WIDTH = 16


class Experts(nn.Module):
    """A mixture as it is usually written: each expert is handed the tokens that were sent to it, in its own order."""

    def __init__(self, count=3):
        super().__init__()
        self.gate = nn.Linear(WIDTH, count)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, WIDTH)) for _ in range(count)]
        )

    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            place, token = torch.where((chosen == number).T)
            result.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return result.reshape(x.shape)


class Model(nn.Module):
    """Blocks between an embedding and a mean over real tokens; ``turned``: they work on T×B×d."""

    def __init__(self, block, turned=False):
        super().__init__()
        torch.manual_seed(0)
        self.turned, self.embed = turned, nn.Embedding(40, WIDTH)
        self.blocks, self.head = nn.ModuleList([block() for _ in range(2)]), nn.Linear(WIDTH, 2)

    def forward(self, input_ids, attention_mask, **_others):
        x = self.embed(input_ids)
        x = x.transpose(0, 1).contiguous() if self.turned else x
        for block in self.blocks:
            x = x + block(x)
        x = x.transpose(0, 1) if self.turned else x
        pooled = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return SequenceClassifierOutput(logits=self.head(pooled))


class Feedforward(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))


def alone(model, samples, layers):
    """C and G of every layer, each sample on its own and without padding."""
    inputs, gradients, units = {name: [] for name in layers}, {name: [] for name in layers}, 0
    for batch in samples:
        for row, label in enumerate(batch["labels"]):
            length = int(batch["attention_mask"][row].sum())
            one = {"input_ids": batch["input_ids"][row : row + 1, :length], "labels": label[None]}
            one["attention_mask"] = torch.ones_like(one["input_ids"])
            seen = {}
            handles = [
                layer.register_forward_hook(lambda _m, args, out, n=name, seen=seen: seen.update({n: (args[0], out)}))
                for name, layer in layers.items()
            ]
            loss = CLASSIFY.losses(CLASSIFY.logits(model, one), one).sum()
            for handle in handles:
                handle.remove()
            found = torch.autograd.grad(loss, [out for _, out in seen.values()])
            for (name, (x, _)), gradient in zip(seen.items(), found, strict=True):
                inputs[name].append(x.detach().reshape(-1, x.shape[-1]).double())
                gradients[name].append(gradient.reshape(-1, gradient.shape[-1]).double())
            units += 1
    return {name: (torch.cat(inputs[name]), torch.cat(gradients[name]), units) for name in layers}


MODELS = {
    "experts": lambda: Model(Experts),
    "turned": lambda: Model(Feedforward, turned=True),
    "turned experts": lambda: Model(Experts, turned=True),
}


@pytest.mark.parametrize("make", MODELS)
def test_padding_does_not_count_wherever_a_token_goes(make):
    model, samples = MODELS[make](), batches(((5, 3, 8), (7, 7, 2), (1, 9, 4)))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "head"}
    statistics = calibrate(model, CLASSIFY, samples, layers).statistics
    for name, (x, g, units) in alone(model, samples, layers).items():
        moment = statistics.input_of(name)
        assert moment.tokens == len(x)
        assert moment.sampling.samples <= units
        torch.testing.assert_close(moment.second_moment.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.gradients[name].double(), g.T @ g / units, rtol=1e-4, atol=1e-9)


def test_a_table_of_positions_with_as_many_rows_as_tokens_has_no_padding():
    """DeBERTa: 2·4 rows of relative positions, in batches of 2×4 tokens."""
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        vocab_size=40,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        relative_attention=True,
        position_buckets=4,
        pos_att_type=["c2p", "p2c"],
        share_att_key=False,
        norm_rel_ebd="layer_norm",
    )
    model = transformers.DebertaV2ForSequenceClassification(config).eval()
    samples = batches(((4, 2), (3, 4)))
    table = model.deberta.encoder.get_rel_embedding().detach()
    layers = select_layers(model)
    names = [name for name in layers if name.endswith(("pos_key_proj", "pos_query_proj"))]
    assert table.shape[0] == samples[0]["attention_mask"].numel()
    assert len(names) == 4
    statistics = calibrate(model, CLASSIFY, samples, layers).statistics
    for name in names:
        moment = statistics.input_of(name).second_moment
        torch.testing.assert_close(moment, table.T @ table / len(table), rtol=1e-4, atol=1e-6)
    for name in set(layers) - set(names):
        assert statistics.input_of(name).tokens == 13
    # The walk leaves nothing out either.
    plan = truncate(Calibrated(model, CLASSIFY, statistics), STRONG)
    result = truncate_along(Calibrated(model, CLASSIFY, statistics), samples, plan, gradient_shrinkage=0.0)
    assert not result.notes


def test_an_expert_that_no_real_token_comes_to_is_refused_by_name():
    model, samples = Model(Experts), batches(((5, 3), (7, 2)))
    for block in model.blocks:
        block.gate.bias.data[2] = -1e4
    layers = {"blocks.0.experts.2.0": model.blocks[0].experts[2][0]}
    with pytest.raises(InputError, match=r"no token of this data reaches blocks\.0\.experts\.2\.0"):
        calibrate(model, CLASSIFY, samples, layers)


def moved_rows():
    """(what is done to x (2×5×6), the numbers of the rows that come of it)."""
    numbers = torch.arange(10).reshape(2, 5)
    picked = torch.tensor([7, 0, 3])
    kept = torch.tensor([True, False] * 5)
    return {
        "linear": (lambda x: nn.functional.linear(x, torch.ones(3, 6)), numbers),
        "heads": (lambda x: x.view(2, 5, 2, 3).transpose(1, 2).transpose(1, 2).reshape(2, 5, 6), numbers),
        "transposed": (lambda x: x.transpose(0, 1), numbers.T),
        "picked": (lambda x: x.reshape(-1, 6)[picked], picked),
        "masked": (lambda x: x.reshape(-1, 6)[kept], numbers.flatten()[kept]),
        "added": (lambda x: torch.zeros(10, 6).index_add_(0, picked, x.reshape(-1, 6)[picked]), None),
        "put back": (lambda x: x.clone().reshape(-1, 6).index_put_((picked,), x.reshape(-1, 6)[picked] * 2), "same"),
        "residual": (lambda x: torch.zeros_like(x).add_(x.cumsum(1)) + x, numbers),
        "padded": (lambda x: nn.functional.pad(x, (0, 0, 1, 0)), nn.functional.pad(numbers, (1, 0), value=-1)),
        "joined": (lambda x: torch.cat([torch.ones(2, 1, 6), x], 1), nn.functional.pad(numbers, (1, 0), value=-1)),
        "copies": (lambda x: x[:, :, None].expand(2, 5, 3, 6).sum(2), numbers),
        "attention": (lambda x: (x @ x.mT).softmax(-1) @ x, numbers),
        "pooled": (lambda x: x.mean(1), None),
        "sorted": (lambda x: x.sort(1).values, None),
    }


@pytest.mark.parametrize("kind", moved_rows())
def test_numbers_go_with_their_rows(kind):
    move, expected = moved_rows()[kind]
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    rows = TokenRows((2, 5))
    rows.start(x)
    with rows:
        result = move(x)
    assert rows.is_marked(result)
    assert not rows.is_marked(torch.zeros(2, 5, 6))
    found = rows.rows(result)
    if kind == "added":  # rows that nothing was added to are none
        expected = torch.full((10,), -1)
        expected[[7, 0, 3]] = torch.tensor([7, 0, 3])
    if isinstance(expected, str):
        expected = torch.arange(10)
    assert (found is None) == (expected is None)
    if found is not None:
        assert torch.equal(found.long(), expected)
