"""Two choices in the graphs of encoders, each against its alternative on ONNX Runtime's CPU kernels.

    python benchmarks/encoder_operators.py --out benchmarks/results/encoder-operators.json

*patches*: the convolution of a ViT-B/16's patches in float32, and as dynamic quantisation writes it
(``converters/onnx/quantize.py`` leaves it in float32). *attention*: with heads side by side, as the linear layers give
them, and with the transposes that a model writes (``converters/onnx/heads.py``). Alternatives take turns with a pause
between them, since the threads of a session go on spinning for a while; medians over all requests are reported.
"""

import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from converters.onnx.quiet import quiet
from prehab_export.system.machine import machine_facts

HEADS, WIDTH = 12, 64
# Batch and tokens.
ATTENTIONS = [(1, 128), (1, 197), (1, 384), (8, 197)]
BATCHES = (1, 8)
REQUESTS, PAUSE_S = 5, 0.05


@click.command(help=__doc__)
@click.option("--threads", type=int, multiple=True, default=(1, 2))
@click.option("--turns", type=int, default=8)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(threads: tuple[int, ...], turns: int, out: Path) -> None:
    rows = []
    graphs = {"heads side by side": attention(False), "transposed": attention(True)}
    patches = convolutions()
    for count in threads:
        for batch, tokens in ATTENTIONS:
            feeds = {name: random(batch, tokens, HEADS * WIDTH) for name in ("q", "k", "v")}
            sizes = {"what": "attention", "threads": count, "batch": batch, "tokens": tokens}
            rows += measured(graphs, feeds, count, turns, sizes)
        for batch in BATCHES:
            sizes = {"what": "patches", "threads": count, "batch": batch}
            rows += measured(patches, {"x": random(batch, 3, 224, 224)}, count, turns, sizes)
    command = shlex.join(["python", "benchmarks/encoder_operators.py", *sys.argv[1:]])
    out.write_text(json.dumps({"command": command, "machine": machine_facts(), "rows": rows}, indent=1) + "\n")


def measured(graphs: dict[str, bytes], feeds: dict[str, np.ndarray], threads: int, turns: int, sizes: dict) -> list:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    sessions = {name: onnxruntime.InferenceSession(graph, options) for name, graph in graphs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(turns):
        for name, session in sessions.items():
            time.sleep(PAUSE_S)
            session.run(None, feeds)
            for _ in range(REQUESTS):
                started = time.perf_counter()
                session.run(None, feeds)
                seconds[name].append(time.perf_counter() - started)
    rows = [sizes | {"kind": name, "ms": 1e3 * median(times)} for name, times in seconds.items()]
    click.echo(f"{sizes} { ({row['kind']: round(row['ms'], 3) for row in rows}) }", err=True)
    return rows


def attention(transposed: bool) -> bytes:
    heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
    if not transposed:
        return graph([helper.make_node("Attention", ["q", "k", "v"], ["y"], **heads)], ["q", "k", "v"])
    nodes, turned = [], []
    for name in ("q", "k", "v"):
        nodes.append(helper.make_node("Reshape", [name, "split"], [f"{name}.split"]))
        nodes.append(helper.make_node("Transpose", [f"{name}.split"], [f"{name}.turned"], perm=[0, 2, 1, 3]))
        turned.append(f"{name}.turned")
    nodes.append(helper.make_node("Attention", turned, ["mixed"]))
    nodes.append(helper.make_node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Reshape", ["back", "whole"], ["y"]))
    shapes = {"split": [0, 0, HEADS, WIDTH], "whole": [0, 0, HEADS * WIDTH]}
    return graph(nodes, ["q", "k", "v"], {name: np.array(shape) for name, shape in shapes.items()})


def convolutions() -> dict[str, bytes]:
    """The same patches in float32 and after dynamic quantisation."""
    node = helper.make_node("Conv", ["x", "weight"], ["y"], kernel_shape=[16, 16], strides=[16, 16])
    plain = graph([node], ["x"], {"weight": random(768, 3, 16, 16)}, axes=4)
    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder, "plain.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(plain)
        quantised = {}
        for kind in (QuantType.QInt8, QuantType.QUInt8):
            quantize_dynamic(source, target, per_channel=True, weight_type=kind)
            quantised[str(kind)] = target.read_bytes()
        return {"float32": plain, **quantised}


def graph(nodes: list, inputs: list[str], weights: dict[str, np.ndarray] | None = None, axes: int = 3) -> bytes:
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}{axis}" for axis in range(axes)])
        for name in [*inputs, "y"]
    }
    held = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    made = helper.make_graph(nodes, "operators", [values[name] for name in inputs], [values["y"]], held)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


if __name__ == "__main__":
    main()
