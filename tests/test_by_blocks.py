"""Large models are held as they are stored and worked on block by block: with the results of any other way."""

import pytest
import torch
from test_block_walk import Appends, ByName, InPlace, Shares, TwoStreams, calibrated
from test_drift import CLASSIFY, FAMILIES, STRONG, along, prepared

from converters.errors import InputError
from prehab_export.compression import calibration, chain, checkpoints
from prehab_export.compression.block_walk import BlockWalk
from prehab_export.compression.blocks import find_blocks
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.calibration import Gather, calibrate
from prehab_export.compression.chain import Chain
from prehab_export.compression.drift import truncate_along
from prehab_export.compression.factor_files import FactorFiles
from prehab_export.compression.moment_files import MomentWriter, load_statistics
from prehab_export.compression.refinement import block_refiner
from prehab_export.compression.spool import Folders, MemoryLimits, Spool
from prehab_export.compression.training import frozen_copy, sharing_copy
from prehab_export.compression.truncation import truncate
from prehab_export.config.training import RefineConfig
from prehab_export.inputs.models import load_model

pytestmark = pytest.mark.filterwarnings("ignore::prehab_export.compression.calibration.CalibrationWarning")


def assert_same_moments(found, expected, sampling=True):
    assert list(found.groups.items()) == list(expected.groups.items())
    assert found.units == expected.units
    for group, moment in expected.inputs.items():
        torch.testing.assert_close(found.inputs[group].second_moment, moment.second_moment, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.inputs[group].mean, moment.mean, rtol=1e-4, atol=1e-6)
        assert found.inputs[group].tokens == moment.tokens
        if sampling:
            assert found.inputs[group].sampling.error == pytest.approx(moment.sampling.error, rel=1e-3, abs=1e-9)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_by_blocks_are_those_of_whole_passes(family, gradients, monkeypatch):
    model, task, batches, layers, *_ = prepared(family)
    gather = Gather(gradients=gradients)
    by_blocks = calibrate(model, task, batches, layers, gather=gather).statistics
    runs = []
    monkeypatch.setattr(calibration, "_chain", lambda *_: runs.append(1))
    whole = calibrate(model, task, batches, layers, gather=gather).statistics
    assert runs
    assert_same_moments(by_blocks, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_when_states_lie_in_files(family):
    model, task, batches, layers, statistics, plan = prepared(family)
    in_memory = along(model, task, batches, layers, statistics, plan)
    limits = MemoryLimits(spool_bytes=0)
    assert_same_moments(calibrate(model, task, batches, layers, gather=Gather(limits=limits)).statistics, statistics)
    in_files = along(model, task, batches, layers, statistics, plan, limits=limits)
    for name, pair in in_memory.factors.items():
        assert torch.equal(in_files.factors[name].up, pair.up)
        assert torch.equal(in_files.factors[name].down, pair.down)


@pytest.mark.parametrize(("family", "padded"), [("llama", True), ("vit", False)])
def test_the_size_of_a_micro_batch_makes_no_difference_but_rounding(family, padded):
    model, task, batches, layers, statistics, plan = prepared(family, padded=padded)
    together = along(model, task, batches, layers, statistics, plan)
    limits = MemoryLimits(positions=1)  # every sample by itself
    apart = calibrate(model, task, batches, layers, gather=Gather(limits=limits)).statistics
    # The sampling error is that of moments about the mean of the first micro-batch.
    assert_same_moments(apart, statistics, sampling=False)
    by_sample = along(model, task, batches, layers, statistics, plan, limits=limits)
    for name, pair in together.factors.items():
        found = by_sample.factors[name]
        torch.testing.assert_close(found.up @ found.down, pair.up @ pair.down, rtol=1e-2, atol=1e-3)


def test_files_go_with_what_they_hold(tmp_path):
    spool = Spool(limit=8, folder=tmp_path)
    values = [torch.arange(2.0), torch.arange(6.0).reshape(2, 3), torch.arange(4.0)]
    held = [spool.keep(value) for value in values]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert all(torch.equal(one.load(), value) for one, value in zip(held, values, strict=True))
    del held[2]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    del held[0]  # memory is free again
    held.append(spool.keep(values[0]))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    del spool
    assert torch.equal(held[0].load(), values[1])
    held.clear()
    assert not list(tmp_path.iterdir())


def test_logits_in_pieces_give_the_same_moments(monkeypatch):
    model, task, batches, layers, *_ = prepared("llama")
    whole = calibrate(model, task, batches, layers).statistics
    monkeypatch.setattr(chain, "PIECE_BYTES", 4 * model.config.vocab_size * 6)
    sizes = []
    logits = chain.Chain.logits
    monkeypatch.setattr(
        chain.Chain, "logits", lambda self, batch, final: sizes.append(final.shape[1]) or logits(self, batch, final)
    )
    in_pieces = calibrate(model, task, batches, layers).statistics
    assert max(sizes) < batches[0]["input_ids"].shape[1]
    assert_same_moments(in_pieces, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_held_as_stored_computes_what_a_wide_one_does(family, dtype, tmp_path):
    model, task, batches, layers, *_ = prepared(family)
    model.to(dtype).save_pretrained(tmp_path)
    wide, stored = load_model(str(tmp_path), task), load_model(str(tmp_path), task, dtype=None)
    batch = batches[0]
    with torch.no_grad():
        assert torch.equal(task.logits(stored, batch), task.logits(wide, batch))
    assert all(parameter.dtype == dtype for parameter in stored.parameters())
    moments = [calibrate(loaded, task, batches, list_of(loaded, layers)).statistics for loaded in (stored, wide)]
    assert_same_moments(*moments)
    results = []
    for loaded, statistics in zip((stored, wide), moments, strict=True):
        plan = truncate(Calibrated(loaded, task, statistics), STRONG)
        results.append(along(loaded, task, batches, None, statistics, plan))
    for name, pair in results[1].factors.items():
        assert results[0].factors[name].up.dtype == torch.float32
        torch.testing.assert_close(results[0].factors[name].up, pair.up)
        torch.testing.assert_close(results[0].factors[name].down, pair.down)
    with torch.no_grad():
        answers = [
            task.logits(result.apply(loaded), batch) for result, loaded in zip(results, (stored, wide), strict=True)
        ]
    torch.testing.assert_close(*answers)


def list_of(model, layers):
    return {name: model.get_submodule(name) for name in layers}


def test_weights_in_single_precision_are_read_as_ever(tmp_path):
    model, task, batches, *_ = prepared("bert")
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), task, dtype=None)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(task.logits(loaded, batches[0]), task.logits(model, batches[0]))


def test_moments_written_block_by_block_are_those_in_memory(tmp_path):
    model, task, batches, layers, statistics, plan = prepared("llama")
    written = calibrate(model, task, batches, layers, gather=Gather(save_to=tmp_path / "moments")).statistics
    # Inputs on the way forward, gradients on the way back.
    assert len(list((tmp_path / "moments").glob("*.safetensors"))) == 2 * len(model.model.layers)
    for found in (written, load_statistics(tmp_path / "moments")):
        assert_same_moments(found, statistics)
        for name, pair in truncate(Calibrated(model, task, found), STRONG).factors.items():
            assert torch.equal(pair.up, plan.factors[name].up)


def test_moments_that_are_damaged_or_not_complete_are_refused(tmp_path):
    model, task, batches, layers, *_ = prepared("bert")
    calibrate(model, task, batches, layers, gather=Gather(save_to=tmp_path / "moments"))
    part = next((tmp_path / "moments").glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"safetensors is missing or damaged .*; calibrate again"):
        load_statistics(tmp_path / "moments")
    (tmp_path / "moments" / "index.json").unlink()
    with pytest.raises(InputError, match="holds no calibration statistics"):
        load_statistics(tmp_path / "moments")


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_modules_with_final_weights_run_once_more_and_give_the_same_from_then_on(family):
    model, task, batches, layers, *_ = prepared(family)
    with torch.no_grad():
        walk = BlockWalk(Chain.of(model, task, batches[0], layers), frozen_copy(model), batches, Spool())
        block = find_blocks(model, layers)[0]
        order = walk.order[block.name]
        attention = [name for name in order if "attn" in name or "attention" in name]
        behind, last = order[len(attention)], order[-1]
        runs = []
        walk.student.get_submodule(attention[-1]).register_forward_hook(lambda *_: runs.append(1))
        walk.run_dense(block, [[name] for name in order])

        def inputs(name):
            return [student.input for _dense, (student,), *_ in walk.observe(block, [name])]

        before = [inputs(behind), inputs(last)]
        assert len(runs) == 2 * len(batches)
        walk.finish(block, attention)
        after = [inputs(behind), inputs(last)]
        assert len(runs) == 3 * len(batches)
        walk.advance(block)
        assert len(runs) == 3 * len(batches)
        expected = [walk.dense_states[number].load() for number in range(len(batches))]
    for found, known in zip(after, before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(found, known, strict=True))
    for number, state in enumerate(expected):
        torch.testing.assert_close(walk._student.states[number].load(), state)


@pytest.mark.parametrize("kind", [Appends, ByName, InPlace, Shares, TwoStreams])
def test_blocks_of_every_kind_give_the_moments_of_whole_passes(kind, monkeypatch):
    """Those that share something, through which gradients flow too, are run as a whole to begin with."""
    model, batches, layers, found = calibrated(kind)
    monkeypatch.setattr(calibration, "_chain", lambda *_: None)
    assert_same_moments(found, calibrate(model, CLASSIFY, batches, layers).statistics)


def test_a_copy_that_shares_weights_leaves_out_the_graph_of_the_latest_pass():
    """Some models keep a state of their latest pass, which may be part of a graph."""
    model = torch.nn.Linear(2, 2)
    model.state = model(torch.ones(1, 2))
    copied = sharing_copy(model)
    assert copied.weight is model.weight
    assert torch.equal(copied.state, model.state)
    assert copied.state.grad_fn is None


class Killed(BaseException):
    pass


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_calibration_goes_on_after_a_kill(gradients, family, tmp_path, monkeypatch):
    """At the block where it was, and to the same moments, bit for bit."""
    model, task, batches, layers, *_ = prepared(family)

    def gather(name):
        return Gather(gradients=gradients, save_to=tmp_path / name)

    expected = calibrate(model, task, batches, layers, gather=gather("whole")).statistics
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)
    add, written = MomentWriter.add, []

    def add_or_die(self, part):
        if written:
            raise Killed
        written.append(part)
        return add(self, part)

    with monkeypatch.context() as patched:
        patched.setattr(MomentWriter, "add", add_or_die)
        with pytest.raises(Killed):
            calibrate(model, task, batches, layers, gather=gather("killed"))
    with pytest.raises(InputError, match="no calibration statistics"):
        load_statistics(tmp_path / "killed")
    again = []
    monkeypatch.setattr(MomentWriter, "add", lambda self, part: again.append(part) or add(self, part))
    found = calibrate(model, task, batches, layers, gather=gather("killed")).statistics
    assert len(again) == len(list((tmp_path / "whole").glob("*.safetensors"))) - 1
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert_same_moments(found, expected)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("refines", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_truncation_goes_on_after_a_kill(family, refines, tmp_path, monkeypatch):
    """At the block where it was, and to the same factors, bit for bit; they are those that stay in memory."""
    model, task, batches, _layers, statistics, plan = prepared(family)
    config = RefineConfig(block_steps=3)
    after_block = block_refiner(config, statistics) if refines else None

    def factors(folder):
        return truncate_along(
            Calibrated(model, task, statistics),
            batches,
            plan,
            gradient_shrinkage=STRONG.gradient_shrinkage,
            after_block=after_block,
            folders=Folders(save_to=folder),
        )

    held, expected = factors(None), factors(tmp_path / "whole")
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)
    write, written = FactorFiles.write, []

    def write_or_die(self, number, block):
        if number == 1:
            raise Killed
        written.append(number)
        return write(self, number, block)

    with monkeypatch.context() as patched:
        patched.setattr(FactorFiles, "write", write_or_die)
        with pytest.raises(Killed):
            factors(tmp_path / "killed")
    monkeypatch.setattr(
        FactorFiles, "write", lambda self, number, block: written.append(number) or write(self, number, block)
    )
    found = factors(tmp_path / "killed")
    assert written == [0, 1]
    for other in (held, found):
        assert other.layers == expected.layers
        assert (other.shared, other.notes) == (expected.shared, expected.notes)
        assert other.factors.keys() == expected.factors.keys()
        assert other.refits.keys() == expected.refits.keys()
        for name, pair in expected.factors.items():
            assert torch.equal(other.factors[name].up, pair.up)
            assert torch.equal(other.factors[name].down, pair.down)
        for group in expected.shared:
            assert len({id(other.factors[name].down) for name in group}) == 1
    answers = [result.apply(frozen_copy(model)) for result in (held, found)]
    with torch.no_grad():
        torch.testing.assert_close(*(task.logits(answer, batches[0]) for answer in answers), rtol=0, atol=0)
