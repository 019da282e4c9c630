"""The roofline model (Williams, Waterman and Patterson, 2009): the time of a model against the limits of the machine.

The ceilings are measured with ONNX Runtime, at the number of threads in use. They are the rates of a large matrix
product in float32 and in int8, and the rate at which a product with a single row reads its weights. A request takes at
least the time of its multiply-adds at these rates, and at least the time to read its weights once. The ratio of this
bound to the measured time shows how much faster the same work could run.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from converters.onnx.quantize import quantize_graph
from prehab_export.measurement.kernel_cost import INT8_OPERATORS
from prehab_export.measurement.worker_process import WorkerProcess

Row = dict[str, Any]

# Widths of a square weight that fits into a cache, and of one that fits into none.
CACHED_WIDTH, STREAMED_WIDTH = 1024, 6144
TURN_SECONDS = 0.3


@dataclass(frozen=True)
class Ceilings:
    """Peak rates of a machine with a number of threads: 10⁹ float32 or int8 operations and 10⁹ bytes per second."""

    threads: int
    float32_gflops: float
    int8_gops: float
    read_gb_s: float

    def bound_ms(self, float32_gflop: float, int8_gop: float, weight_mb: float) -> float:
        """Return the lower bound of the time for an amount of work, in milliseconds.

        >>> Ceilings(1, 100.0, 200.0, 10.0).bound_ms(float32_gflop=1.0, int8_gop=1.0, weight_mb=50.0)
        15.0
        """
        compute = 1e3 * (float32_gflop / self.float32_gflops + int8_gop / self.int8_gops)
        return max(compute, weight_mb / self.read_gb_s)


@cache
def measure_ceilings(threads: int, provider: str, timeout_s: float) -> Ceilings:
    """Measure the ceilings of this machine, once per process and arguments.

    Three products run for about a second, each in its own process. The fastest run of each counts.

    Args:
        provider: ONNX Runtime's name of the execution provider.
        timeout_s: time limit of each answer of a worker, in seconds.

    Raises:
        InputError: a worker failed or exceeded the time limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        product, stream = Path(folder, "product.onnx"), Path(folder, "stream.onnx")
        ir.save(_product_model(CACHED_WIDTH), product)
        ir.save(_product_model(STREAMED_WIDTH), stream)
        quantised = quantize_graph(product, Path(folder, "int8.onnx"), "int8")

        def fastest_ms(graph: Path, rows: int) -> float:
            case = {"threads": threads, "batch": rows, "sequence": None, "new_tokens": 1, "vocab_size": None}
            with WorkerProcess(f"the ceilings ({graph.stem})", timeout_s) as worker:
                worker.ask(action="load", model=str(graph), provider=provider, case=case, sample_memory=False)
                return min(worker.ask(action="turn", min_runs=5, min_seconds=TURN_SECONDS)["total_ms"])

        operations = 2e-9 * CACHED_WIDTH**3
        return Ceilings(
            threads,
            float32_gflops=operations / (1e-3 * fastest_ms(product, CACHED_WIDTH)),
            int8_gops=operations / (1e-3 * fastest_ms(quantised, CACHED_WIDTH)),
            read_gb_s=4e-9 * STREAMED_WIDTH**2 / (1e-3 * fastest_ms(stream, 1)),
        )


def _product_model(size: int) -> ir.Model:
    """Return a model that multiplies x (rows × size) by a square weight."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.val("x", ir.DataType.FLOAT, ["rows", size])
    array = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    values = ir.tensor(array, name="weight")
    weight = ir.Value(name="weight", type=kind, shape=ir.Shape([size, size]), const_value=values)
    node = ir.node("MatMul", [x, weight])
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", kind, ir.Shape(["rows", size])
    graph = ir.Graph([x], [y], nodes=[node], initializers=[weight], name="product", opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def roofline_of(case: Row, weight_bytes: int, ceilings: Ceilings) -> Row:
    """Compare the figures of a case with the ceilings. For a decoder, the results are per new token.

    Args:
        case: a row of the bench's cases, with its operators.
        weight_bytes: bytes of weights that one run reads.

    Returns:
        gflop (float32 and int8 together), weight_mb, bound_ms, and share_of_bound (bound over measured median).
    """
    decodes = "next_token" in case["operators"]
    operators: Sequence[Mapping[str, Any]] = case["operators"]["next_token" if decodes else "request"]
    median_ms = case["inter_token_p50_ms"] if decodes else case["p50_ms"]
    int8_gop = sum(row["gflop"] for row in operators if row["op"] in INT8_OPERATORS)
    total_gflop = sum(row["gflop"] for row in operators)
    bound = ceilings.bound_ms(total_gflop - int8_gop, int8_gop, weight_bytes / 1e6)
    return {
        "gflop": total_gflop,
        "weight_mb": weight_bytes / 1e6,
        "bound_ms": bound,
        "share_of_bound": bound / median_ms if median_ms else None,
    }
