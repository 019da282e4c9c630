"""Calibration and truncation of a language model: seconds, memory and perplexity, and beside it SVD-LLM's own steps.

    prehab-export smollm2 -o smollm2
    python benchmarks/scale.py smollm2 --data wikitext2 --ratio 0.4 --out benchmarks/results/scale-smollm2.json

Each way runs in a process of its own, one after the other, on the same windows. ``ours`` are the default options:
weights as stored, ``calibrate`` with gradients, ``compress`` with drift correction. With ``--enough`` it takes the
samples that a pilot asks for, as a run does, and counts the pilot. ``svd-llm`` are the steps of its published code: one
forward pass that sums x xᵀ for every layer, Cholesky of each sum, singular values of W L in float32, the same share
removed from every layer. Memory is the largest resident and the largest anonymous memory, sampled every 50 ms. The
perplexity is taken over the first windows of the evaluation split, in PyTorch.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from torch import Tensor, nn

from converters.lowrank import Factors, dense_weight, factorize
from converters.selection import select_layers
from prehab_export.compression.calibration import Gather, calibrate
from prehab_export.compression.closed_form import Samplesets, compress
from prehab_export.compression.sample_size import needed_samples
from prehab_export.compression.spool import Folders
from prehab_export.config.calibrate import CalibrateConfig
from prehab_export.config.data import DataConfig
from prehab_export.config.truncate import TruncateConfig
from prehab_export.inputs.batch_splitting import micro_batches
from prehab_export.inputs.data.loading import load_data
from prehab_export.inputs.data.samples import Samples
from prehab_export.inputs.evaluation import evaluate, torch_predictor
from prehab_export.inputs.models import load_config, load_model, load_processor
from prehab_export.inputs.tasks import TASKS
from prehab_export.linalg.allocation import uniform_rank
from prehab_export.system.heap import keep_freed_memory
from prehab_export.system.machine import machine_facts

TASK = TASKS["text-generation"]
WAYS = ("dense", "svd-llm", "ours")


@click.command(help=__doc__)
@click.argument("model")
@click.option("--data", required=True)
@click.option("--windows", type=int, default=128)
@click.option("--length", type=int, default=512, help="Tokens in a window.")
@click.option("--evaluation", type=int, default=40, help="Windows of the evaluation split.")
@click.option("--ratio", type=float, default=0.4)
@click.option("--enough/--all-windows", default=False)
@click.option("--gradient-units", type=int, default=CalibrateConfig.gradient_units, help="As calibrate.gradient_units.")
@click.option("--way", "ways", type=click.Choice(WAYS), multiple=True, default=WAYS)
@click.option("--threads", type=int, default=2)
@click.option("--seed", type=int, default=0)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--one", is_flag=True, hidden=True, help="Run the one way in this process, and print its row.")
def main(model: str, ways: tuple[str, ...], out: Path, one: bool, **options: Any) -> None:
    if one:
        print(json.dumps(_row(model, ways[0], options)))
        return
    arguments = [argument for argument in sys.argv[1:] if argument not in WAYS and argument != "--way"]
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": shlex.join(["python", "benchmarks/scale.py", *sys.argv[1:]]),
        "machine": machine_facts(),
        "options": {"model": model, **options},
        "rows": [],
    }
    for way in ways:
        command = [sys.executable, __file__, *arguments, "--way", way, "--one"]
        result["rows"].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _row(model: str, way: str, options: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(options["threads"])
    keep_freed_memory()  # as the program does, for every way
    data_options = DataConfig(options["data"], sequence_length=options["length"])
    data = load_data(data_options, TASK, load_processor(model, TASK), load_config(model), seed=options["seed"])
    samples = data.train.subset(min(options["windows"], len(data.train)), options["seed"])
    row: dict[str, Any] = {"way": way}
    with peaks(row):
        if way == "dense":
            result: nn.Module = load_model(model, TASK, dtype=None)
        else:
            result = (_ours if way == "ours" else _svd_llm)(model, samples, options, row)
    evaluation = data.evaluation.first(min(options["evaluation"], len(data.evaluation)))
    metrics = evaluate(torch_predictor(result, TASK), TASK, evaluation.batches(4))
    return row | {"perplexity": metrics.value, "loss": metrics.loss, "predictions": metrics.units}


def _ours(name: str, samples: Samples, options: dict[str, Any], row: dict[str, Any]) -> nn.Module:
    model = load_model(name, TASK, dtype=None)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        if options["enough"]:
            pilot = calibrate(model, TASK, samples.first(16).batches(32), gather=Gather(gradients=False))
            needed = max(16, ceil(1.25 * needed_samples(pilot.statistics)))
            samples = samples.first(min(needed, len(samples)))
            row["pilot_s"] = time.perf_counter() - start
        row["windows"] = len(samples)
        gather = Gather(save_to=Path(folder) / "moments", gradient_units=options["gradient_units"])
        calibrated = calibrate(model, TASK, samples.batches(32), gather=gather, seed=options["seed"])
        row["calibrate_s"] = time.perf_counter() - start
        start = time.perf_counter()
        config = TruncateConfig(ratio=options["ratio"])
        folders = Folders(Path(folder), Path(folder) / "factors")
        truncation = compress(calibrated, Samplesets(samples, samples, folders=folders), config).truncation
        row["truncate_s"] = time.perf_counter() - start
        row["share_removed"] = truncation.summary()["selected_share_removed"]
        return truncation.apply(model, copy=False)


@torch.no_grad()
def _svd_llm(name: str, samples: Samples, options: dict[str, Any], row: dict[str, Any]) -> nn.Module:
    model = load_model(name, TASK)
    layers = select_layers(model)
    sums = {
        layer: torch.zeros(dense_weight(module).shape[1], dense_weight(module).shape[1])
        for layer, module in layers.items()
    }
    start = time.perf_counter()
    row["windows"] = len(samples)

    def summing(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2)
            sums[layer] += rows.T @ rows

        return hook

    handles = [module.register_forward_pre_hook(summing(layer)) for layer, module in layers.items()]
    for batch in micro_batches(samples.batches(32)):
        TASK.logits(model, batch)
    for handle in handles:
        handle.remove()
    row["calibrate_s"] = time.perf_counter() - start
    start = time.perf_counter()
    factors = {}
    for layer, module in layers.items():
        weight = dense_weight(module)
        second = sums[layer].double()
        second.diagonal().add_(1e-6 * second.diagonal().mean())
        root = torch.linalg.cholesky(second)
        u, s, vh = torch.linalg.svd((weight.double() @ root).float(), full_matrices=False)
        rank = uniform_rank(*weight.shape, keep=1 - options["ratio"])
        if rank is None:
            continue
        half = s[:rank].sqrt()
        down = torch.linalg.solve_triangular(root.float(), half[:, None] * vh[:rank], upper=False, left=False)
        factors[layer] = Factors(u[:, :rank] * half, down)
    row["truncate_s"] = time.perf_counter() - start
    before = sum(dense_weight(module).numel() for module in layers.values())
    kept = sum(
        factors[layer].up.numel() + factors[layer].down.numel() if layer in factors else dense_weight(module).numel()
        for layer, module in layers.items()
    )
    row["share_removed"] = 1 - kept / before
    return factorize(model, factors)


@contextmanager
def peaks(row: dict[str, Any]) -> Iterator[None]:
    """Record the largest resident and anonymous memory of this process within the context, in MB."""
    process, stop, largest = psutil.Process(), threading.Event(), [0.0, 0.0]

    def watch() -> None:
        while not stop.wait(0.05):
            memory = process.memory_info()
            shared = getattr(memory, "shared", 0)
            largest[0] = max(largest[0], memory.rss / 1e6)
            largest[1] = max(largest[1], (memory.rss - shared) / 1e6)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        row["peak_resident_mb"], row["peak_anonymous_mb"] = largest


if __name__ == "__main__":
    main()
