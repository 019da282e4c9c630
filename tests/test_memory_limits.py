"""``--max-memory``: what it means, what it changes, and what it refuses before anything slow."""

from dataclasses import replace

import pytest
import torch
from small_models import build
from test_pipeline import invoke, vit_options

from converters.errors import InputError
from prehab_export.compression.spool import USUAL_LIMITS
from prehab_export.config.compute import memory_bytes
from prehab_export.config.data import DataConfig
from prehab_export.config.run import RunConfig
from prehab_export.inputs.evaluation import evaluate, torch_predictor
from prehab_export.inputs.tasks import TASKS
from prehab_export.pipeline import estimating
from prehab_export.pipeline.memory import LEAST_SPOOL, Memory
from prehab_export.pipeline.workload import Layer, Workload


@pytest.mark.parametrize(
    ("text", "count"),
    [("16GB", 16e9), ("1.5 gb", 1.5e9), ("512MiB", 2**29), ("2GiB", 2**31), ("300kB", 3e5), ("auto", None)],
)
def test_sizes_have_units(text, count):
    assert memory_bytes(text) == count


@pytest.mark.parametrize("text", ["16", "GB", "0GB", "-1GB", "16 gallons", "", "infGB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="--max-memory"):
        RunConfig("m", "text-generation", DataConfig("d"), max_memory=text)


def llama_7b(context: float = 1024) -> Workload:
    """The sizes of a LLaMA with 7 billion weights."""
    layers, count = [], 0
    for block in range(32):
        for name, m, n, source in (
            *((name, 4096, 4096, 0) for name in ("q", "k", "v")),
            ("o", 4096, 4096, 1),
            *((name, 11008, 4096, 2) for name in ("gate", "up")),
            ("down", 4096, 11008, 3),
        ):
            layers.append(Layer(f"layers.{block}.{name}", m, n, context, 4 * block + source))
            count += m * n
    parameters = count + 2 * 32000 * 4096
    return Workload(2 * parameters * context, 32 * context * 100_000, context * 32000, parameters, tuple(layers))


CONFIG = RunConfig("m", "text-generation", DataConfig("d"))
BLOCKWISE = ("calibrate", "truncate")


def test_work_by_blocks_on_a_large_model_fits_in_18_gb():
    memory = Memory(CONFIG, llama_7b(), 0.6, half=True).within(BLOCKWISE, 18e9)
    for stage in BLOCKWISE:
        need = memory.need(stage)
        assert need.held <= 18e9
        assert need.mapped >= 2 * memory.workload.parameters  # the weights as they are stored, and moments
    assert memory.need("rehab").held > 27e9  # training holds all of it in float32


def test_limits_shrink_until_the_work_fits():
    memory = Memory(CONFIG, llama_7b(), 0.6, half=True)
    usual = max(memory.need(stage).held for stage in BLOCKWISE)
    assert memory.within(BLOCKWISE, usual).limits == USUAL_LIMITS
    smaller = memory.within(BLOCKWISE, usual - 0.5e9)
    assert max(smaller.need(stage).held for stage in BLOCKWISE) <= usual - 0.5e9
    assert smaller.limits.spool_bytes < USUAL_LIMITS.spool_bytes
    assert smaller.limits.positions == USUAL_LIMITS.positions
    smallest = memory.within(BLOCKWISE, 0)
    assert (smallest.limits.spool_bytes, smallest.limits.positions) == (LEAST_SPOOL, 1024)  # one sample
    # What is not in the way is not made smaller.
    assert memory.within(("rehab",), 100e9).limits == USUAL_LIMITS


def test_a_run_that_cannot_fit_is_refused_before_anything_slow(vit_folder, tmp_path, monkeypatch, capsys):
    from prehab_export.pipeline import session

    monkeypatch.setattr(session, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    for more in ([], ["--dry-run"]):
        options = [*vit_options(vit_folder), "-o", tmp_path / "run", "--max-memory", "1MB", *more]
        assert invoke("run", *options) == 2
        error = capsys.readouterr().err
        assert "of memory even in the smallest pieces, and --max-memory allows 1 MB; give --max-memory" in error


def test_an_estimate_comes_first_and_little_free_memory_is_only_warned_of(vit_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimating, "_free_memory", lambda: 0)
    assert invoke("calibrate", *vit_options(vit_folder), "-o", tmp_path / "run") == 0
    error = " ".join(capsys.readouterr().err.split())
    assert (
        error.index("of memory at peak (calibrate")
        < error.index("warning: calibrate may take")
        < error.index("done in")
    )
    assert invoke("calibrate", tmp_path / "run") == 0  # nothing is to do
    assert "at peak" not in capsys.readouterr().err


def test_a_limit_does_not_make_results_stale(vit_folder, tmp_path, capsys):
    assert invoke("calibrate", *vit_options(vit_folder), "-o", tmp_path / "run", "--max-memory", "20GB") == 0
    capsys.readouterr()
    assert invoke("calibrate", tmp_path / "run", "--max-memory", "30GB") == 0
    assert "calibrate: up to date" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_pieces_of_a_batch_have_its_loss_and_metric(family):
    model, task = build(family), TASKS["text-generation" if family == "llama" else "text-classification"]
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(1, 50, (6, 8)), "labels": torch.tensor([0, 1] * 3)}
    if family == "llama":
        batch["labels"] = batch["input_ids"]
    seen = []

    def predict(part):
        seen.append(len(part["input_ids"]))
        return torch_predictor(model, task)(part)

    whole = evaluate(predict, task, [batch])
    pieces = evaluate(predict, task, [batch], positions=16)
    assert seen == [6, 2, 2, 2]
    assert replace(pieces, loss=whole.loss, value=whole.value) == whole
    assert (pieces.loss, pieces.value) == pytest.approx((whole.loss, whole.value), rel=1e-5)
