"""``merge-lora``: an adapter into the factors of a finished artifact, giving another artifact of the same ranks."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from converters.adapters import merge_into_factors
from converters.dtypes import DTYPES, cast_weights
from converters.errors import InputError
from converters.folder import from_pretrained, save_folder
from converters.genai import write_genai_config
from converters.lowrank import low_rank_layers
from converters.onnx.inputs import image_inputs, text_inputs
from converters.onnx.latent import kind_of_cache
from converters.onnx.session import open_session
from prehab_export.bench_config import BenchConfig
from prehab_export.config import TruncateConfig
from prehab_export.export import export_exact
from prehab_export.models import load_processor, task_of
from prehab_export.parity import reference_of
from prehab_export.progress import result_console
from prehab_export.report import render
from prehab_export.session import STATISTICS, quiet_libraries
from prehab_export.statistics import Statistics, load_statistics
from prehab_export.tasks import Batch, Task
from prehab_export.truncation import layer_metric
from prehab_export.weight_files import weight_files
from prehab_export.workspace import Workspace


def merge_lora(
    artifact: Path,
    adapter: Path,
    output: Path,
    statistics: Path | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Merge a PEFT LoRA adapter into an artifact's factors and write the result, with its ONNX graph if it had one.

    An adapter trained on the factors merges exactly. One trained on the dense model is cut back to each layer's
    rank, in the whitened metric when calibration statistics are at hand.

    Args:
        artifact: a compressed folder, or the folder of a run.
        output: a new or empty folder.
        statistics: found by itself when the artifact lies in its run's folder.

    Raises:
        InputError: no such folder, an adapter for another base, an output folder that is not empty.
        ParityError: the new graph does not compute what the merged model computes; nothing is written.
    """
    quiet_libraries()
    artifact = artifact / "artifact" if (artifact / "artifact").is_dir() else artifact
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not empty; give a new folder with -o")
    model = from_pretrained(artifact, dtype=torch.float32, trust_remote_code=trust_remote_code)
    if not low_rank_layers(model):
        raise InputError(f"{artifact} holds no two-factor layers; merge into a dense model with `run --adapter`")
    task = task_of(model.config)
    processor = load_processor(str(artifact), task, trust_remote_code=trust_remote_code)
    found = statistics or _statistics_of(artifact)
    moments = None if found is None else load_statistics(found)
    merged = merge_into_factors(model, adapter, None if moments is None else _metric(model, moments))
    # Merged in float32 and rounded once, as an artifact is; the graph is of the rounded weights.
    dtype = DTYPES[weight_files(str(artifact)).kept_dtype]
    facts: dict[str, Any] = {
        "artifact": artifact.resolve().name,
        "adapter": adapter.resolve().name,
        "metric": "none (plain)" if moments is None else "whitened",
        "layers": {name: asdict(layer) for name, layer in merged.layers.items()},
        "replaced": list(merged.replaced),
    }
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        cast_weights(model, dtype)
        save_folder(model, partial, processor)
        cast_weights(model, torch.float32)
        if (artifact / "onnx" / "model.onnx").is_file():
            names = getattr(processor, "model_input_names", None) if task.name != "image-classification" else None
            reference = reference_of(model, task, [_example(model, task)])
            threads = threads or BenchConfig().threads
            graph = Path("onnx", "model.onnx")
            kind = kind_of_cache(node.name for node in open_session(artifact / graph).get_inputs())
            export = export_exact(model, partial / graph, task, reference, names, threads, kind)
            if task.name == "text-generation":
                write_genai_config(model, partial, graph, export.inputs)
        (partial / "README.md").write_text(render("merged.md.j2", facts), encoding="utf-8")
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


def _statistics_of(artifact: Path) -> Path | None:
    """The moments that the artifact was made from, where it lies in its run's folder."""
    if (run := Workspace.existing(artifact.resolve().parent)) is None:
        return None
    candidates = [run.folder(stage) / STATISTICS for stage in ("prehab", "calibrate") if run.has(stage)]
    return next((path for path in candidates if path.is_file()), None)


def _metric(model: PreTrainedModel, statistics: Statistics) -> Any:
    layers, damping = low_rank_layers(model), TruncateConfig().gradient_shrinkage

    def metric(name: str) -> tuple[Tensor | None, Tensor | None]:
        if name not in statistics.groups:
            return None, None
        # Not centred: a merge has no say in the bias, so the mean error counts too.
        own = layer_metric(name, layers[name], statistics, damping, fold_mean=False)
        return own.second_moment, own.gradient_moment

    return metric


def _example(model: PreTrainedModel, task: Task) -> Batch:
    generator = torch.Generator().manual_seed(0)
    if task.name == "image-classification":
        pixels = image_inputs(model).tensors["pixel_values"]
        return {"pixel_values": torch.randn(pixels.shape, generator=generator)}
    return text_inputs(model, None).tensors


def print_merge(facts: dict[str, Any]) -> None:
    console = result_console()
    layers = facts["layers"]
    inexact = {name: layer["error"] for name, layer in layers.items() if not layer["exact"]}
    console.print(f"merged {facts['adapter']} into {facts['artifact']}: {len(layers)} layers")
    if inexact:
        worst = max(inexact, key=lambda name: inexact[name])
        console.print(
            f"{len(inexact)} were cut back to their rank ({facts['metric']} metric); "
            f"largest relative error {inexact[worst]:.3f}, at {worst}"
        )
