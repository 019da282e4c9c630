"""Counted work against torch's own counter; bounds against arithmetic."""

import sys

import pytest
import torch
from small_models import build
from torch.utils.flop_counter import FlopCounterMode

from converters.onnx.export import export_onnx
from converters.onnx.graph_facts import read_graph
from converters.onnx.quantize import quantize_graph
from prehab_export.config.bench import BenchConfig
from prehab_export.measurement.benchmark import bench
from prehab_export.measurement.kernel_cost import multiply_adds
from prehab_export.measurement.roofline import Ceilings, measure_ceilings, roofline_of
from prehab_export.pipeline.report.plots import plot_roofline


def test_multiply_adds_by_hand():
    assert multiply_adds("Gemm", [[3, 8]], [[3, 5]]) == 3 * 8 * 5
    assert multiply_adds("MatMulNBits", [[2, 3, 8], [5, 4]], [[2, 3, 5]]) == 2 * 3 * 8 * 5
    assert multiply_adds("Conv", [[1, 3, 8, 8], [6, 3, 4, 4]], [[1, 6, 2, 2]]) == 6 * 2 * 2 * 3 * 4 * 4
    assert multiply_adds("Add", [[3, 8], [3, 8]], [[3, 8]]) == 0
    query, key, value = [2, 4, 3, 8], [2, 2, 5, 8], [2, 2, 5, 8]
    assert multiply_adds("Attention", [query, key, value], [query]) == 2 * (2 * 4 * 3 * 5 * 8)
    query, key, value = [2, 3, 4 * 8], [2, 5, 2 * 8], [2, 5, 2 * 8]
    assert multiply_adds("Attention", [query, key, value], [query]) == 2 * (2 * 4 * 3 * 5 * 8)


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize("family", ["vit", "bert"])
def test_counted_work_is_torchs(family, mode, tmp_path):
    model = build(family)
    task = "image-classification" if family == "vit" else "text-classification"
    path = export_onnx(model, task, tmp_path / "model.onnx").path
    if mode is not None:
        path = quantize_graph(path, tmp_path / f"{mode}.onnx", mode)
    if family == "vit":
        inputs = {"pixel_values": torch.zeros(2, 3, model.config.image_size, model.config.image_size)}
    else:
        ids = torch.zeros(2, 8, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    config = BenchConfig(threads=1, batch_sizes=(2,), sequence_lengths=(8,), warmup=0, rounds=1, min_seconds=0.0)
    result = bench({"m": path}, config)
    (row,) = result["cases"]
    assert row["gflop"] == pytest.approx(counter.get_total_flops() / 1e9, rel=0.02)
    plot_roofline(result, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 5000


def test_tables_that_are_looked_up_are_not_read_whole(tmp_path):
    model = build("bert")
    path = export_onnx(model, "text-classification", tmp_path / "model.onnx").path
    tables = sum(module.weight.nbytes for module in model.modules() if isinstance(module, torch.nn.Embedding))
    every = sum(parameter.nbytes for parameter in model.parameters())
    assert read_graph(path).weight_bytes == pytest.approx(every - tables, rel=0.05)


def test_the_bound_is_the_longer_of_two():
    peaks = Ceilings(threads=1, float32_gflops=100.0, int8_gops=400.0, read_gb_s=10.0)
    assert peaks.bound_ms(1.0, 0.0, 0.0) == 10.0
    assert peaks.bound_ms(0.0, 1.0, 0.0) == 2.5
    assert peaks.bound_ms(1.0, 1.0, 200.0) == 20.0
    entries = [
        {"op": "MatMul", "gflop": 0.5},
        {"op": "DynamicQuantizeMatMul", "gflop": 1.0},
        {"op": "Add", "gflop": 0.0},
    ]
    case = {"operators": {"first_token": [], "next_token": entries}, "inter_token_p50_ms": 15.0, "p50_ms": 99.0}
    row = roofline_of(case, 1_000_000, peaks)
    assert row == {"gflop": 1.5, "weight_mb": 1.0, "bound_ms": 7.5, "share_of_bound": 0.5}


@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux")
def test_ceilings_are_measured_with_the_runtime():
    peaks = measure_ceilings(1, "CPUExecutionProvider", 60.0)
    assert peaks.float32_gflops > 1
    assert peaks.int8_gops > 1
    assert peaks.read_gb_s > 0.5
