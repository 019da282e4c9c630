"""Devices and precisions: half precision in the forward pass and nowhere else, and everything where the model is.

Half precision is tested on the CPU, whose autocast and gradient scaling are the same code. What needs a GPU skips.
"""

import copy
import json
from unittest.mock import patch

import numpy as np
import pytest
import torch
from runs import stage_folder
from small_models import build
from test_pipeline import UNGUARDED
from torch import nn

from converters.errors import InputError
from converters.folder import from_pretrained
from converters.selection import select_layers
from prehab_export.cli.entry import main
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.calibration import Gather, calibrate
from prehab_export.compression.closed_form import Samplesets, compress
from prehab_export.compression.drift import truncate_along
from prehab_export.compression.factored import Factored
from prehab_export.compression.moment_files import load_statistics, save_statistics
from prehab_export.compression.prehabilitation import prehab
from prehab_export.compression.refinement import block_refiner, refine
from prehab_export.compression.rehabilitation import rehab
from prehab_export.compression.training import Trainable, frozen_copy, labelled_loss, optimise, train
from prehab_export.compression.truncation import truncate
from prehab_export.config.bench import BenchConfig
from prehab_export.config.data import DataConfig
from prehab_export.config.run import RunConfig
from prehab_export.config.training import PrehabConfig, RefineConfig, RefineSchedule, RehabConfig, Schedule, TrainConfig
from prehab_export.config.truncate import TruncateConfig
from prehab_export.inputs import devices
from prehab_export.inputs.data.samples import Samples
from prehab_export.inputs.evaluation import evaluate, torch_predictor
from prehab_export.inputs.tasks import TASKS
from prehab_export.pipeline.stages.table import STAGES

FAMILIES = {"vit": "image-classification", "bert": "text-classification", "llama": "text-generation"}
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
STRONG = TruncateConfig(ratio=0.7)
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


def samples_for(task, count=32):
    """Random inputs; a classifier's label depends on them, so that there is something to learn."""
    generator = torch.Generator().manual_seed(3)
    if task.name == "image-classification":
        pixels = torch.randn(count, 3, 16, 16, generator=generator)
        columns = {"pixel_values": pixels, "labels": (pixels[:, 0, :8, :8].mean((1, 2)) > 0).long()}
    else:
        columns = {"input_ids": torch.randint(2, 50, (count, 12), generator=generator)}
    if task.name == "text-classification":
        lengths = torch.randint(4, 12, (count, 1), generator=generator)
        columns |= {"attention_mask": (torch.arange(12) < lengths).long(), "labels": columns["input_ids"][:, 0] % 2}
    return Samples(np.arange(count), lambda rows: {name: value[list(rows)] for name, value in columns.items()})


def prepared(family):
    task, model = TASKS[FAMILIES[family]], build(family)
    return task, model, samples_for(task), select_layers(model)


def relative(actual, expected):
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return float((actual - expected).norm() / expected.norm())


def seen_by(model, task, batch, layers):
    """Inputs and output gradients of every layer in one pass, as rows without padding, float64; and how many units."""
    inputs, outputs = {}, {}

    def hook(name):
        def note(_layer, args, output):
            inputs[name], outputs[name] = args[0].detach(), output

        return note

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    unit_logits = task.unit_logits(task.logits(model, batch), batch)
    loss = nn.functional.cross_entropy(unit_logits.float(), task.unit_labels(batch), reduction="sum")
    for handle in handles:
        handle.remove()
    gradients = dict(zip(layers, torch.autograd.grad(loss, [outputs[name] for name in layers]), strict=True))
    mask = task.token_mask(batch)

    def rows(values):
        per_token = mask is not None and values.shape[:-1] == mask.shape
        return (values[mask] if per_token else values.reshape(-1, values.shape[-1])).double()

    dtypes = {output.dtype for output in outputs.values()}
    return {n: rows(x) for n, x in inputs.items()}, {n: rows(g) for n, g in gradients.items()}, len(unit_logits), dtypes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", HALF)
def test_moments_of_half_precision_values_are_taken_in_float32(family, precision):
    """Against float64 sums over what autocast let flow: a product under autocast would be off by 1e-3."""
    task, model, samples, layers = prepared(family)
    task, batch = task.at(precision), samples.collate(range(32))
    statistics = calibrate(model, task, [batch], layers).statistics
    inputs, gradients, units, dtypes = seen_by(model, task, batch, layers)
    assert dtypes == {HALF[precision]}
    for name in layers:
        moment, gradient = statistics.input_of(name), statistics.gradients[name]
        assert {moment.second_moment.dtype, moment.mean.dtype, gradient.dtype} == {torch.float32}
        x, g = inputs[name], gradients[name]
        assert relative(moment.second_moment, x.T @ x / len(x)) < 1e-5
        assert relative(moment.mean, x.mean(0)) < 1e-5
        # Only in float16 is the loss scaled, so that its gradients are rounded otherwise than those of the reference.
        assert relative(gradient, g.T @ g / units) < (1e-5 if precision == "bfloat16" else 5e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", HALF)
def test_moments_in_half_precision_are_close_to_those_in_float32(family, precision):
    task, model, samples, layers = prepared(family)
    single = calibrate(model, task, samples.batches(8), layers).statistics
    half = calibrate(model, task.at(precision), samples.batches(8), layers).statistics
    for name in layers:
        assert relative(half.input_of(name).second_moment, single.input_of(name).second_moment) < 2e-2
        # Gradients are rounded on the way forth and back.
        assert relative(half.gradients[name], single.gradients[name]) < (5e-2 if precision == "bfloat16" else 1e-2)
        assert half.gradient_sampling[name].error == pytest.approx(single.gradient_sampling[name].error, rel=5e-2)


def test_float32_never_meets_autocast():
    task, model, samples, layers = prepared("bert")
    plain = calibrate(model, task, samples.batches(8), layers).statistics
    with patch.object(torch, "autocast", side_effect=AssertionError):
        named = calibrate(model, task.at("float32"), samples.batches(8), layers).statistics
    for name in layers:
        assert torch.equal(plain.gradients[name], named.gradients[name])
        assert torch.equal(plain.input_of(name).second_moment, named.input_of(name).second_moment)


@pytest.mark.parametrize("size", [1e-5, 1e4])
def test_float16_calibration_neither_loses_small_gradients_nor_overflows_on_large_ones(size):
    """``size`` scales what the head sends back; float16 reaches from 6e-8 to 6.5e4."""
    task, model, samples, layers = prepared("vit")
    with torch.no_grad():
        model.classifier.weight *= size
    single = calibrate(model, task, samples.batches(8), layers).statistics
    half = calibrate(model, task.at("float16"), samples.batches(8), layers).statistics
    for name in layers:
        assert relative(half.gradients[name], single.gradients[name]) < 2e-2


def test_moments_that_float16_cannot_hold_are_refused_by_name():
    task, model, samples, layers = prepared("vit")
    with torch.no_grad():
        layers["vit.layers.0.mlp.fc1"].bias.fill_(1e5)
    with pytest.raises(InputError, match=r"vit\.layers\.0\.mlp\.fc2 .*bfloat16"):
        calibrate(model, task.at("float16"), samples.batches(8), layers)


@pytest.mark.parametrize("precision", HALF)
def test_training_in_half_precision_lowers_the_loss_and_keeps_float32_weights(precision):
    task, model, samples, _ = prepared("vit")
    schedule = Schedule(steps=40, batch_size=16, learning_rate=1e-3)
    halved = task.at(precision)

    def loss():
        return evaluate(torch_predictor(model, task), task, samples.batches(32)).loss

    before = loss()
    trainable = Trainable(model, list(model.parameters()), precision=precision)
    history = train(trainable, samples, schedule, labelled_loss(halved, frozen_copy(model), 0.1))
    assert len(history) == 40
    assert loss() < 0.7 * before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_what_follows_the_backward_pass_sees_gradients_clipped_and_without_the_scale():
    task, model, samples, _ = prepared("vit")
    schedule, seen = Schedule(steps=1, batch_size=16, clip=0.5), {}
    for precision in ("float32", "float16"):
        own = copy.deepcopy(model)
        parameters = list(own.parameters())

        def keep(_step, precision=precision, parameters=parameters):
            seen[precision] = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            return {}

        loss = labelled_loss(task.at(precision))
        train(Trainable(own, parameters, precision=precision), samples, schedule, loss, after_backward=keep)
    assert float(seen["float32"].norm()) == pytest.approx(0.5, rel=1e-4)
    assert relative(seen["float16"], seen["float32"]) < 2e-2


def test_a_step_whose_float16_gradients_overflow_is_not_taken():
    weight, values = nn.Parameter(torch.ones(4)), []

    def loss_at(_step):
        values.append(float(weight.detach()[0]))
        # A slope of 1 times the first scale, 65,536, is just more than float16 holds.
        return weight.half().sum().float(), {}

    schedule = Schedule(steps=4, learning_rate=1e-2, warmup=0.5, clip=1e9)
    history = optimise(Trainable(nn.Module(), [weight], precision="float16"), schedule, loss_at)
    assert values[0] == values[1] > values[2] > values[3]
    assert history[1]["learning_rate"] == history[0]["learning_rate"] < history[2]["learning_rate"]


class _Overflow(torch.autograd.Function):
    @staticmethod
    def forward(_context, x):
        return x.sum()

    @staticmethod
    def backward(_context, _gradient):
        return torch.full((4,), torch.inf)


def test_gradients_that_float16_can_never_hold_end_the_run():
    weight = nn.Parameter(torch.ones(4))
    with pytest.raises(FloatingPointError, match="bfloat16"):
        optimise(
            Trainable(nn.Module(), [weight], precision="float16"),
            Schedule(steps=30),
            lambda _step: (_Overflow.apply(weight), {}),
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_drift_corrected_factors_in_bfloat16_do_what_those_in_float32_do(family):
    task, model, samples, layers = prepared(family)
    statistics = calibrate(model, task, samples.batches(8), layers).statistics
    plan = truncate(Calibrated(model, task, statistics), STRONG)
    found = {}
    for precision in ("float32", "bfloat16"):
        own = task.at(precision)
        along = truncate_along(
            Calibrated(model, own, statistics), samples.batches(8), plan, gradient_shrinkage=STRONG.gradient_shrinkage
        )
        assert along.ranks == plan.ranks
        assert {tensor.dtype for pair in along.factors.values() for tensor in (pair.up, pair.down)} == {torch.float32}
        found[precision] = along.apply(frozen_copy(model))
    batch = samples.collate(range(32))
    with torch.no_grad():
        dense, single, half = (task.logits(m, batch) for m in (model, found["float32"], found["bfloat16"]))
    assert (half - single).norm() < 0.1 * (single - dense).norm()


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("precision", ["float32", *HALF])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_up_to_the_artifact_stays_on_the_device_in_float32(family, precision, device, tmp_path):
    """Calibration to rehab with batches from the CPU; on CUDA any tensor left behind would raise."""
    task, model, samples, _ = prepared(family)
    task, model = task.at(precision), model.to(device)
    layers, sets = select_layers(model), Samplesets(samples, samples, 8)
    path = tmp_path / "moments"
    save_statistics(calibrate(model, task, samples.batches(8), layers).statistics, path)
    statistics = load_statistics(path, device)
    refinement = RefineConfig(RefineSchedule(steps=2, batch_size=8), block_steps=2, hidden_share=0.3)
    config = TruncateConfig(ratio=0.7, objective="auto")
    truncation = compress(
        Calibrated(model, task, statistics), sets, config, after_block=block_refiner(refinement, statistics)
    ).truncation
    student, teacher = truncation.apply(frozen_copy(model)).requires_grad_(True), frozen_copy(model)
    refine(Factored(student, task), samples, refinement, teacher=teacher)

    def held_out(candidate):
        return evaluate(torch_predictor(candidate, task), task, samples.batches(8)).loss

    for method in ("factors", "lora"):
        short = RehabConfig(TrainConfig(steps=2, batch_size=8), method=method, lora_rank=2)
        rehab(Factored(student, task), samples, short, held_out_loss=held_out, teacher=teacher)
    for update in ("gradient", "proximal"):
        options = PrehabConfig(TrainConfig(steps=3, batch_size=8), update=update, refresh_every=2)
        prehab(Calibrated(model, task, statistics), samples, options, STRONG)
    for tensor in (*student.state_dict().values(), *model.state_dict().values(), *statistics.gradients.values()):
        assert tensor.device.type == device
        assert tensor.dtype in (torch.float32, torch.int64)
        assert tensor.isfinite().all()


@pytest.mark.parametrize("name", ["mps", "mps:0", "gpu", "cuda:x", "cuda:-1", ""])
def test_a_device_that_is_none_is_refused_before_torch_is_asked(name):
    with pytest.raises(InputError, match="--device"):
        RunConfig("model", "text-generation", DataConfig("data"), device=name)
    with pytest.raises(InputError, match="--device"):
        devices.choose_device(name)


def test_a_device_that_is_not_here_is_refused_and_auto_takes_what_there_is():
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(InputError, match="--device cpu"):
        devices.choose_device(absent)
    assert devices.choose_device("cpu") == torch.device("cpu")
    assert devices.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_precision_that_is_none_is_refused():
    with pytest.raises(InputError, match="--precision"):
        TASKS["text-generation"].at("int8")
    with pytest.raises(InputError, match="--precision"):
        RunConfig("model", "text-generation", DataConfig("data"), precision="tf32")


def arguments(folder, output, *more):
    quick = ["--calibration-samples", "32", "--eval-samples", "24", "--batch-size", "16", "--threads", "1"]
    data = ["--task", "image-classification", "--data", "sklearn-digits", "--set", "bench.rounds=1"]
    return [str(argument) for argument in (folder, "-o", output, *data, *quick, *more)]


def invoke(*command):
    with pytest.raises(SystemExit) as stop:
        main(list(command))
    return int(stop.value.code or 0)


@pytest.mark.parametrize("more", [["--device", "mps"], ["--device", "cuda:99"]])
def test_the_command_line_refuses_a_device_before_any_work(vit_folder, tmp_path, capsys, more):
    assert invoke("run", *arguments(vit_folder, tmp_path / "run", *more)) == 2
    assert "--device" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_run_in_bfloat16_ends_in_an_exact_float32_artifact(vit_folder, tmp_path):
    output = tmp_path / "run"
    trained = ["--prehab-steps", "2", *UNGUARDED, "--refine-steps", "2", "--rehab-steps", "2"]
    trained += ["--refine-block-steps", "2", "--precision", "bfloat16", "--device", "cpu"]
    assert invoke("verify", *arguments(vit_folder, output, *trained)) == 0
    model = from_pretrained(output / "artifact")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    metrics = json.loads((stage_folder(output, "verify") / "verify.json").read_text())["metrics"]
    # Both from float32 logits: under autocast they would differ by about 1e-2.
    assert metrics.keys() == {"dense_onnx", "compressed_onnx"}
    statistics = load_statistics(stage_folder(output, "calibrate") / "statistics")
    assert all(gradient.dtype == torch.float32 for gradient in statistics.gradients.values())


def test_what_is_computed_depends_on_the_precision_and_not_on_the_device(vit_folder):
    def options(**changes):
        data = DataConfig("sklearn-digits", eval_samples=8)
        config = RunConfig(str(vit_folder), "image-classification", data, bench=BenchConfig(threads=1), **changes)
        return {name: stage.options(config) for name, stage in STAGES.items() if name != "report"}

    plain = options(device="cpu")
    assert options(device="auto") == options(device="cuda:1") == plain
    changed = options(device="cpu", precision="bfloat16")
    # All that follows calibration reads what it made; the dense twin does not.
    assert {name for name in plain if changed[name] != plain[name]} == {"calibrate"}
    assert "calibrate" not in STAGES["baseline"].parents


def test_moments_stay_with_the_model_only_where_they_leave_room(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1000, 2000))
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert devices.room_for(500, cuda) == cuda
    assert devices.room_for(501, cuda) == cpu
    assert devices.room_for(10**15, cpu) == cpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moments_in_main_memory_serve_a_model_on_a_gpu():
    task, model, samples, layers = prepared("llama")
    model.to("cuda")
    results = []
    for keep_on in (torch.device("cuda", 0), torch.device("cpu")):
        statistics = calibrate(model, task, samples.batches(4), layers, gather=Gather(keep_on=keep_on)).statistics
        assert statistics.device == keep_on
        results.append(truncate(Calibrated(model, task, statistics), STRONG).factors)
    for name, pair in results[0].items():
        assert pair.up.device.type == results[1][name].up.device.type == "cuda"
        torch.testing.assert_close(
            pair.up @ pair.down, results[1][name].up @ results[1][name].down, rtol=1e-3, atol=1e-4
        )
