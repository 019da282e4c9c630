"""``merge-lora``: an adapter into the factors of a finished artifact, giving another artifact of the same ranks."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from converters.adapter_files import check_adapter
from converters.adapters import merge_into_factors
from converters.dtypes import DTYPES, cast_weights
from converters.errors import InputError
from converters.folder import from_pretrained, save_folder
from converters.genai import write_genai_config
from converters.lowrank import low_rank_layers
from converters.onnx.inputs import BATCH, text_inputs
from converters.onnx.modes import FILE_NAMES, INT8_STATIC
from converters.onnx.options import ExportOptions, modes_beside, options_of
from converters.onnx.ort_format import write_ort
from converters.onnx.quantize import quantize_graph
from converters.onnx.runtime import open_session
from converters.publishing import published_folder
from prehab_export.compression import Statistics, layer_metric, load_statistics
from prehab_export.config import BenchConfig, TruncateConfig
from prehab_export.deployment import TOLERANCE as ORT_TOLERANCE
from prehab_export.deployment import export_exact, largest_difference, reference_of
from prehab_export.inputs import Batch, Task, load_processor, onnx_predictor, task_of, weight_files
from prehab_export.pipeline.session import STATISTICS, quiet_libraries
from prehab_export.pipeline.workspace import Workspace
from prehab_export.system import ParityError, render, warn

GRAPH = Path("onnx", "model.onnx")


def merge_lora(
    artifact: Path,
    adapter: Path,
    output: Path,
    statistics: Path | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Merge a PEFT LoRA adapter into an artifact's factors and write the result, with the ONNX graphs that it had.

    They are made as the artifact's own were: images of the same size, the same inputs and cache, the same kinds of
    quantisation, ``.ort`` files where there were any. What cannot be made again is said, and listed under ``left_out``.
    Quantised graphs are of the merged factors as they are: fitting factors to a grid takes data.

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
    check_adapter(adapter)
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
    with published_folder(output) as made:
        cast_weights(model, dtype)
        save_folder(model, made, processor)
        cast_weights(model, torch.float32)
        facts["graphs"], facts["left_out"] = [], []
        if (artifact / GRAPH).is_file():
            _write_graphs(model, artifact, made, threads or BenchConfig().threads, facts)
        for name in sorted(_missing(artifact / "onnx", made / "onnx") - {row["file"] for row in facts["left_out"]}):
            _leave_out(facts, name, "merge-lora cannot tell how it was made")
        (made / "README.md").write_text(render("pipeline", "merged.md.j2", facts), encoding="utf-8")
    return facts


def _write_graphs(model: PreTrainedModel, artifact: Path, made: Path, threads: int, facts: dict[str, Any]) -> None:
    """The graphs of the artifact again, of the merged model; ``facts`` gets ``graphs`` and ``left_out``, by file name.

    Raises:
        ParityError: a graph does not compute what the merged model computes.
    """
    task, options = task_of(model.config), options_of(artifact / GRAPH)
    model = model.to(options.dtype)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    example = _example(model, task, options)
    reference = reference_of(model, task, [example])
    export = export_exact(model, task, made / GRAPH, options.form, reference, threads=threads)
    if task.name == "text-generation":
        write_genai_config(model, made, GRAPH, export.inputs)
    graphs = [made / GRAPH]
    for mode in modes_beside(artifact / GRAPH):
        target = (made / GRAPH).with_name(FILE_NAMES[mode])
        if mode == INT8_STATIC:
            _leave_out(facts, target.name, "its ranges are found on data; run `prehab-export quantize` on a run for it")
            continue
        quantize_graph(made / GRAPH, target, mode)
        if not onnx_predictor(open_session(target, threads), task)(example).isfinite().all():
            raise ParityError(f"{target.name} of the merged model does not answer in numbers")
        graphs.append(target)
    facts["graphs"] += [graph.name for graph in graphs]
    for graph in graphs:
        if (artifact / GRAPH).with_name(f"{graph.stem}.ort").is_file():
            _write_ort(graph, example, threads, facts)


def _missing(folder: Path, other: Path) -> set[str]:
    """The names of files that ``folder`` has and ``other`` has not."""
    had, has = ({file.name for file in place.iterdir()} if place.is_dir() else set() for place in (folder, other))
    return had - has


def _write_ort(graph: Path, example: Batch, threads: int, facts: dict[str, Any]) -> None:
    try:
        files = write_ort(graph, graph.parent)
    except InputError as reason:
        _leave_out(facts, f"{graph.stem}.ort", str(reason))
        return
    apart = largest_difference(graph, files.model, [example], threads)
    if not apart <= ORT_TOLERANCE:
        raise ParityError(f"{files.model.name} is off by {apart:.1e} from {graph.name}, {ORT_TOLERANCE:.0e} is allowed")
    facts["graphs"].append(files.model.name)


def _leave_out(facts: dict[str, Any], name: str, reason: str) -> None:
    facts["left_out"].append({"file": name, "reason": reason})
    warn(f"no {name} in the merged artifact: {reason}")


def _statistics_of(artifact: Path) -> Path | None:
    """The moments that the artifact was made from, where it lies in its run's folder."""
    if (run := Workspace.open_existing(artifact.resolve().parent)) is None:
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


def _example(model: PreTrainedModel, task: Task, options: ExportOptions) -> Batch:
    if options.image_size is None:
        return text_inputs(model, None).tensors
    shape = (BATCH, options.channels or 3, *options.image_size)
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(options.dtype)}
