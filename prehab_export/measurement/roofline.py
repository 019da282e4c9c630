"""How near a model comes to what the machine can do (Williams, Waterman, Patterson 2009: the roofline model).

The ceilings are measured with ONNX Runtime itself, at the threads in use: multiply-adds of a large product in float32
and in int8, and the bytes a second at which weights are read by a product with a single row. A request can take no less
than its multiply-adds at these peaks, and no less than reading its weights once. The share of that bound which a model
reaches says what is left to gain without doing less.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from converters.onnx.quantize import quantize_graph
from prehab_export.measurement.kernel_cost import INT8_OPERATORS
from prehab_export.measurement.worker_process import WorkerProcess

Row = dict[str, Any]

# A product that fits a cache, and weights that fit none.
PRODUCT, STREAM = 1024, 6144
TURN_SECONDS = 0.3


@dataclass(frozen=True)
class Ceilings:
    """Peaks of a machine at so many threads: 10⁹ floating-point or int8 operations, and 10⁹ bytes, a second."""

    threads: int
    float32_gflops: float
    int8_gops: float
    read_gb_s: float

    def bound_ms(self, float32_gflop: float, int8_gop: float, weight_mb: float) -> float:
        """The least milliseconds of so much work.

        >>> Ceilings(1, 100.0, 200.0, 10.0).bound_ms(float32_gflop=1.0, int8_gop=1.0, weight_mb=50.0)
        15.0
        """
        compute = 1e3 * (float32_gflop / self.float32_gflops + int8_gop / self.int8_gops)
        return max(compute, weight_mb / self.read_gb_s)


@cache
def measure_ceilings(threads: int, provider: str, timeout_s: float) -> Ceilings:
    """Three products for a second or so, each in a process of its own; the fastest run of each counts. A machine does
    not change: each is measured once."""
    with tempfile.TemporaryDirectory() as folder:
        product, stream = Path(folder, "product.onnx"), Path(folder, "stream.onnx")
        ir.save(_product(PRODUCT), product)
        ir.save(_product(STREAM), stream)
        quantised = quantize_graph(product, Path(folder, "int8.onnx"), "int8")

        def fastest_ms(graph: Path, rows: int) -> float:
            case = {"threads": threads, "batch": rows, "sequence": None, "new_tokens": 1, "vocab_size": None}
            with WorkerProcess(f"the ceilings ({graph.stem})", timeout_s) as worker:
                worker.ask(action="load", model=str(graph), provider=provider, case=case, sample_memory=False)
                return min(worker.ask(action="turn", min_runs=5, min_seconds=TURN_SECONDS)["total_ms"])

        operations = 2e-9 * PRODUCT**3
        return Ceilings(
            threads,
            float32_gflops=operations / (1e-3 * fastest_ms(product, PRODUCT)),
            int8_gops=operations / (1e-3 * fastest_ms(quantised, PRODUCT)),
            read_gb_s=4e-9 * STREAM**2 / (1e-3 * fastest_ms(stream, 1)),
        )


def _product(size: int) -> ir.Model:
    """x (rows × size) times a square weight."""
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
    """What a case's figures say against the ceilings; of a decoder, for one new token.

    Returns:
        gflop (float32 and int8 together), weight_mb, bound_ms, and share_of_bound: bound over measured median.
    """
    decodes = "next_token" in case["operators"]
    operators: Sequence[Mapping[str, Any]] = case["operators"]["next_token" if decodes else "request"]
    took = case["inter_token_p50_ms"] if decodes else case["p50_ms"]
    int8 = sum(row["gflop"] for row in operators if row["op"] in INT8_OPERATORS)
    every = sum(row["gflop"] for row in operators)
    bound = ceilings.bound_ms(every - int8, int8, weight_bytes / 1e6)
    return {
        "gflop": every,
        "weight_mb": weight_bytes / 1e6,
        "bound_ms": bound,
        "share_of_bound": bound / took if took else None,
    }


def as_row(ceilings: Ceilings) -> Row:
    return asdict(ceilings)
