"""Peak memory of exporting a factored decoder past 2 GB: a LLaMA shape with random bfloat16 weights in several files.

    python benchmarks/large_export.py --out benchmarks/results/large-export.json

A fresh process loads the folder, answers some inputs, writes the float32 graph with its weights in a file of their own,
compares the graph with the answers, and reloads the folder. What Python and its libraries hold after a tiny model went
the same way is left out. Anonymous memory is what was allocated; mapped files are pages that the system may drop.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import onnxruntime
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from converters.folder import save_folder
from converters.lowrank import dense_weight, factorize_empty
from converters.onnx.form import GraphForm
from converters.selection import select_layers
from prehab_export.deployment.exporting import export_exact
from prehab_export.deployment.mapped_models import load_mapped
from prehab_export.deployment.parity import reference_of, tensor_digests
from prehab_export.inputs.tasks import TASKS
from prehab_export.measurement.memory import resident_kb, sampled_memory
from prehab_export.pipeline.session import quiet_libraries
from prehab_export.system.machine import machine_facts

KEPT_RANK = 0.4  # of the smaller side of each layer
TASK = TASKS["text-generation"]


@click.command(help=__doc__)
@click.option("--width", default=3072)
@click.option("--layers", default=7)
@click.option("--threads", default=2)
@click.option("--child", type=click.Path(path_type=Path), hidden=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(width: int, layers: int, threads: int, child: Path | None, out: Path | None) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)
    if child is not None:
        click.echo(json.dumps(measured(child, threads)))
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # not in /tmp, which may be in memory
        make(Path(folder, "tiny"), 128, 1)
        make(Path(folder, "model"), width, layers)
        own = [sys.executable, __file__, "--child", folder, "--threads", str(threads)]
        lines = subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    result = {
        "command": shlex.join(["python", "benchmarks/large_export.py", *sys.argv[1:]]),
        "machine": machine_facts(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, onnxruntime)},
        "shape": {"width": width, "layers": layers, "kept_rank": KEPT_RANK},
        **json.loads(lines[-1]),
    }
    click.echo(json.dumps(result, indent=1))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


@torch.no_grad()
def make(folder: Path, width: int, layers: int) -> None:
    """Write a factored model with random weights."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        vocab_size=32000,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    ranks = {name: int(KEPT_RANK * min(dense_weight(layer).shape)) for name, layer in select_layers(model).items()}
    factorize_empty(model, ranks)
    model.to_empty(device="cpu").tie_weights()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.fill_(1) if "norm" in name else parameter.normal_(0, 0.03)
    save_folder(model.eval(), folder, max_shard_size="500MB")


def measured(folder: Path, threads: int) -> dict[str, Any]:
    exported(folder / "tiny", folder / "tiny-graph", threads)  # loads everything that an export needs
    before = resident_kb()
    steps = exported(folder / "model", folder / "graph", threads)
    size = sum(path.stat().st_size for path in (folder / "graph").iterdir())
    peak = max(step["anonymous_mb"] for step in steps) - before["anonymous"] * 1024 / 1e6
    return {
        "stored_mb": sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors")) / 1e6,
        "graph_mb": size / 1e6,
        "anonymous_before_mb": before["anonymous"] * 1024 / 1e6,
        "steps": steps,
        "peak_anonymous_over_graph": peak * 1e6 / size,
    }


def exported(source: Path, target: Path, threads: int) -> list[dict[str, Any]]:
    """Export a folder; returns seconds and peaks of memory by step."""
    steps = []

    def step(name: str, work: Any) -> Any:
        start = time.perf_counter()
        with sampled_memory() as peaks:
            result = work()
        peaks_mb = {f"{kind}_mb": peaks[kind] * 1024 / 1e6 for kind in ("anonymous", "file")}
        steps.append({"step": name, "seconds": time.perf_counter() - start, **peaks_mb})
        return result

    model = step("load", lambda: load_mapped(source))
    step("digests", lambda: tensor_digests(model))
    batches = [{"input_ids": torch.arange(1, 33).reshape(2, 16)}]
    reference = step("reference answers", lambda: reference_of(model, TASK, batches))
    form = GraphForm(widen=True, external_data_threshold=0)
    step("export", lambda: export_exact(model, TASK, target / "model.onnx", form, reference, threads=threads))
    return steps


if __name__ == "__main__":
    main()
