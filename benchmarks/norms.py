"""Fused operators of ONNX Runtime against their parts, on the CPU: what ``converters/onnx/split.py`` goes by.

    python benchmarks/norms.py --out benchmarks/results/norms.json

Each pair computes the same; turns alternate, medians of turns are reported.
"""

import json
import shlex
import sys
import time
from pathlib import Path
from statistics import median

import click
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from prehab_export.system.machine import machine_facts

MICROSOFT = "com.microsoft"
SIZES = [(1, 2048), (65, 192), (128, 768), (197, 768), (384, 768), (128, 2048)]
NORMS = {
    "SkipLayerNormalization": [
        ("SkipLayerNormalization", ["x", "z", "scale", "bias"], ["y", "", "", "total"], MICROSOFT),
    ],
    "Sum, LayerNormalization": [
        ("Sum", ["x", "z"], ["total"], ""),
        ("LayerNormalization", ["total", "scale", "bias"], ["y"], ""),
    ],
    "SkipSimplifiedLayerNormalization": [
        ("SkipSimplifiedLayerNormalization", ["x", "z", "scale"], ["y", "", "", "total"], MICROSOFT),
    ],
    "Sum, RMSNormalization": [
        ("Sum", ["x", "z"], ["total"], ""),
        ("RMSNormalization", ["total", "scale"], ["y"], ""),
    ],
}
ACTIVATIONS = {
    "BiasGelu": [("BiasGelu", ["x", "bias"], ["y"], MICROSOFT)],
    "Gelu": [("Gelu", ["x"], ["y"], "")],
    "Add": [("Add", ["x", "bias"], ["y"], "")],
}
Nodes = list[tuple[str, list[str], list[str], str]]


@click.command(help=__doc__)
@click.option("--threads", type=int, multiple=True, default=(1, 2))
@click.option("--turns", type=int, default=60)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(threads: tuple[int, ...], turns: int, out: Path) -> None:
    rows = []
    for count in threads:
        for tokens, width in SIZES:
            rows += measured(NORMS, tokens, width, count, turns)
            rows += measured(ACTIVATIONS, tokens, 4 * width, count, turns)
    command = shlex.join(["python", "benchmarks/norms.py", *sys.argv[1:]])
    out.write_text(json.dumps({"command": command, "machine": machine_facts(), "rows": rows}, indent=1) + "\n")


def measured(graphs: dict[str, Nodes], tokens: int, width: int, threads: int, turns: int) -> list[dict]:
    sessions = {name: session(nodes, width, threads) for name, nodes in graphs.items()}
    feeds = {name: np.random.default_rng(0).standard_normal((1, tokens, width), np.float32) for name in "xz"}
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(turns):
        for name, run in sessions.items():
            own = {entry.name: feeds[entry.name] for entry in run.get_inputs()}
            run.run(None, own)
            started = time.perf_counter()
            run.run(None, own)
            seconds[name].append(time.perf_counter() - started)
    sizes = {"threads": threads, "tokens": tokens, "width": width}
    rows = [sizes | {"operators": name, "ms": 1e3 * median(times)} for name, times in seconds.items()]
    click.echo(f"{sizes} { ({row['operators']: round(row['ms'], 4) for row in rows}) }", err=True)
    return rows


def session(nodes: Nodes, width: int, threads: int) -> onnxruntime.InferenceSession:
    made = [
        helper.make_node(op, inputs, outputs, domain=domain, **({"epsilon": 1e-6} if "Norm" in op else {}))
        for op, inputs, outputs, domain in nodes
    ]
    read, written = ({name for node in made for name in names(node) if name} for names in (_inputs, _outputs))
    weights = [numpy_helper.from_array(np.ones(width, np.float32), name) for name in ("scale", "bias") if name in read]
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "t", width]) for name in read | written}
    given = [values[name] for name in "xz" if name in read]
    graph = helper.make_graph(made, "norm", given, [values[name] for name in sorted(written)], weights)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def _inputs(node: onnx.NodeProto) -> list[str]:
    return list(node.input)


def _outputs(node: onnx.NodeProto) -> list[str]:
    return list(node.output)


if __name__ == "__main__":
    main()
