"""Blocks that are called with more than hidden states, or do more than compute: replayed exactly, or refused."""

import pytest
import torch
from test_drift import CLASSIFY, STRONG, along, assert_same_products, batches_for, by_whole_passes
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from converters.selection import select_layers
from prehab_export.compression.blocks import NotAChain, find_blocks
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.calibration import calibrate
from prehab_export.compression.chain import Chain
from prehab_export.compression.dataflow import TokenRows
from prehab_export.compression.recording import numbers_in_order, observe_layers
from prehab_export.compression.truncation import truncate

pytestmark = pytest.mark.filterwarnings("ignore::prehab_export.compression.calibration.CalibrationWarning")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=0.3)
        self.runs = 0

    def change(self, x):
        return self.down(torch.tanh(self.up(x)))


class Appends(Block):
    """Attends, so to speak, to all that was ever put into a list that all blocks share."""

    def forward(self, x, cache):
        cache.append(x.mean(1, keepdim=True))
        return x + self.change(x) + 0.3 * torch.cat(cache, 1).sum(1, keepdim=True)


class Shares(Block):
    """The first block leaves something in a dictionary, which the others read; as layers do that share keys."""

    def forward(self, x, shared):
        shared.setdefault("first", self.change(x))
        return x + self.change(x) + 0.5 * shared["first"]


class InPlace(Block):
    def forward(self, x):
        return x.add_(self.change(x))


class Takes(Block):
    def forward(self, x, factors):
        return x + next(factors) * self.change(x)


class TwoStreams(Block):
    def forward(self, x, residual):
        residual = residual + self.change(x)
        return torch.tanh(residual), residual


class ByName(Block):
    def forward(self, *, hidden_states, scale):
        return {"hidden_states": hidden_states + scale * self.change(hidden_states)}


class Counts(Block):
    def forward(self, x):
        self.runs += 1
        return x + self.change(x) * (1 + 0.1 * self.runs)


class Random(Block):
    def forward(self, x):
        return x + self.change(x) + 0.1 * torch.randn_like(x)


class Scaled(Block):
    def forward(self, x, scale):
        return x + scale * self.change(x)


class Marks(Block):
    def forward(self, x, mark):
        mark.add_(1)
        return x + mark.clone() * self.change(x)


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embed = kind, nn.Embedding(50, 16)
        self.blocks, self.head = nn.ModuleList([kind() for _ in range(3)]), nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask, **_others):
        x = self.embed(input_ids)
        cache, shared, factors, residual = [], {}, iter([1.0, 0.5, 2.0]), x
        generator, mark = (factor for factor in (1.0, 0.5, 2.0)), torch.zeros(1)
        for block in self.blocks:
            if self.kind is Appends:
                x = block(x, cache)
            elif self.kind is Shares:
                x = block(x, shared=shared)
            elif self.kind is Takes:
                x = block(x, factors)
            elif self.kind is TwoStreams:
                x, residual = block(x, residual=residual)
            elif self.kind is ByName:
                x = block(hidden_states=x, scale=0.5)["hidden_states"]
            elif self.kind is Scaled:
                x = block(x, x.std())
            elif self.kind is Generates:
                x = block(x, generator)
            elif self.kind is Marks:
                x = block(x, mark)
            else:
                x = block(x)
        pooled = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return SequenceClassifierOutput(logits=self.head(pooled))


class Generates(Takes):
    pass


def test_a_list_of_lists_is_no_block_but_holds_some():
    model = nn.Module()
    model.stages = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Block()])])
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    assert [block.name for block in find_blocks(model, names)] == ["stages.0.0", "stages.0.1", "stages.1.0"]


def calibrated(kind):
    model, batches = Model(kind).eval(), batches_for(CLASSIFY, count=3, padded=True)
    layers = select_layers(model)
    return model, batches, layers, calibrate(model, CLASSIFY, batches, layers).statistics


@pytest.mark.parametrize("kind", [Appends, Shares, InPlace, Takes, TwoStreams, ByName])
def test_blocks_are_replayed_exactly(kind):
    """Layer by layer the factors are those of whole passes through both models, which replay nothing."""
    model, batches, layers, statistics = calibrated(kind)
    plan = truncate(Calibrated(model, CLASSIFY, statistics), STRONG)
    result = along(model, CLASSIFY, batches, layers, statistics, plan)
    assert not result.notes
    assert_same_products(result.factors, by_whole_passes(model, CLASSIFY, batches, layers, statistics, plan))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Counts, "on its own does not give"),
        (Random, "on its own does not give"),
        (Scaled, "computed from the output of an earlier block"),
        (Generates, "a generator, which cannot be copied"),
        (Marks, "in place"),
    ],
)
def test_blocks_that_cannot_be_replayed_are_no_chain(kind, reason):
    model, batches, layers, _statistics = calibrated(kind)
    with torch.no_grad(), pytest.raises(NotAChain, match=reason):
        Chain.of(model, CLASSIFY, batches[0], layers)


class Counted(nn.Linear):
    runs = 0

    def forward(self, x):
        self.runs += 1
        return super().forward(x)


def test_a_layer_that_writes_to_the_stream_is_not_run_to_see_the_stream():
    block = ByName()
    block.down = Counted(24, 16)
    x = torch.randn(2, 3, 16)

    def observe(writers):
        rows = TokenRows((2, 3))
        rows.number(x, numbers_in_order(x))
        ((run,),) = observe_layers([{"down": block.down}], rows, lambda: x + block.change(x), writers=writers)
        return run

    expected = observe(None)
    assert block.down.runs == 1
    found = observe(["down"])
    assert block.down.runs == 1
    assert torch.equal(found.input, expected.input)
    assert torch.equal(found.residuals["down"], expected.residuals["down"])
    observe(["down", "another"])  # what another writer is added to may depend on this one
    assert block.down.runs == 2
