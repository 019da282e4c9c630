"""``merge-lora``: merge an adapter into the factors of a finished artifact, which gives a new one of the same ranks."""

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
    """Merge a PEFT LoRA adapter into an artifact's factors, and write the new artifact with the same ONNX graphs.

    The new graphs have the old ones' image size, inputs, cache and quantisation modes, and ``.ort`` files if there were
    any. Graphs that cannot be made again cause a warning and are listed under ``left_out``. Quantised graphs use the
    merged factors without refitting them to the grid, which would need data.

    An adapter trained on the factors merges exactly. An adapter trained on the dense model is truncated to each layer's
    rank, in the whitened metric if calibration statistics are available.

    Args:
        artifact: a compressed folder, or the folder of a run.
        adapter: the folder of a PEFT LoRA adapter.
        output: a new or empty folder.
        statistics: a file of calibration statistics; found automatically if the artifact is in its run's folder.
        threads: CPU threads of the checks; None for the default of `BenchConfig`.
        trust_remote_code: run code that comes with the artifact.

    Returns:
        The facts that the new artifact's README shows: ``artifact``, ``adapter``, ``metric``, ``layers``, ``replaced``,
        ``graphs`` and ``left_out``.

    Raises:
        InputError: a folder does not exist, the adapter is for another base, or the output folder is not empty.
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
    statistics = statistics or _find_statistics(artifact)
    moments = None if statistics is None else load_statistics(statistics)
    merge = merge_into_factors(model, adapter, None if moments is None else _layer_metrics(model, moments))
    # Weights are merged in float32 and rounded once, and the graph has the rounded weights, as in any artifact.
    dtype = DTYPES[weight_files(str(artifact)).kept_dtype]
    facts: dict[str, Any] = {
        "artifact": artifact.resolve().name,
        "adapter": adapter.resolve().name,
        "metric": "none (plain)" if moments is None else "whitened",
        "layers": {name: asdict(layer) for name, layer in merge.layers.items()},
        "replaced": list(merge.replaced),
    }
    with published_folder(output) as folder:
        cast_weights(model, dtype)
        save_folder(model, folder, processor)
        cast_weights(model, torch.float32)
        facts["graphs"], facts["left_out"] = [], []
        if (artifact / GRAPH).is_file():
            _export_graphs(model, artifact, folder, threads or BenchConfig().threads, facts)
        omissions = {row["file"] for row in facts["left_out"]}
        for name in sorted(_missing_files(artifact / "onnx", folder / "onnx") - omissions):
            _report_omission(facts, name, "merge-lora does not know how it was made")
        (folder / "README.md").write_text(render("pipeline", "merged.md.j2", facts), encoding="utf-8")
    return facts


def _export_graphs(model: PreTrainedModel, artifact: Path, folder: Path, threads: int, facts: dict[str, Any]) -> None:
    """Export the merged model to the same graphs that the artifact has.

    Args:
        folder: the new artifact.
        facts: receives file names under ``graphs`` and ``left_out``.

    Raises:
        ParityError: a graph does not compute what the merged model computes.
    """
    task, options = task_of(model.config), options_of(artifact / GRAPH)
    model = model.to(options.dtype)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    example = _example(model, task, options)
    reference = reference_of(model, task, [example])
    export = export_exact(model, task, folder / GRAPH, options.form, reference, threads=threads)
    if task.name == "text-generation":
        write_genai_config(model, folder, GRAPH, export.inputs)
    graphs = [folder / GRAPH]
    for mode in modes_beside(artifact / GRAPH):
        target = (folder / GRAPH).with_name(FILE_NAMES[mode])
        if mode == INT8_STATIC:
            reason = "its activation ranges need data; `prehab-export quantize` on a run makes it"
            _report_omission(facts, target.name, reason)
            continue
        quantize_graph(folder / GRAPH, target, mode)
        if not onnx_predictor(open_session(target, threads), task)(example).isfinite().all():
            raise ParityError(f"{target.name} of the merged model gives outputs that are not finite")
        graphs.append(target)
    facts["graphs"] += [graph.name for graph in graphs]
    for graph in graphs:
        if (artifact / GRAPH).with_name(f"{graph.stem}.ort").is_file():
            _write_ort(graph, example, threads, facts)


def _missing_files(folder: Path, other: Path) -> set[str]:
    """Return the names of files in ``folder`` that are missing from ``other``."""
    names, others = ({file.name for file in path.iterdir()} if path.is_dir() else set() for path in (folder, other))
    return names - others


def _write_ort(graph: Path, example: Batch, threads: int, facts: dict[str, Any]) -> None:
    try:
        files = write_ort(graph, graph.parent)
    except InputError as error:
        _report_omission(facts, f"{graph.stem}.ort", str(error))
        return
    difference = largest_difference(graph, files.model, [example], threads)
    if not difference <= ORT_TOLERANCE:  # also catches NaN
        raise ParityError(
            f"{files.model.name} differs by {difference:.1e} from {graph.name}; {ORT_TOLERANCE:.0e} is allowed"
        )
    facts["graphs"].append(files.model.name)


def _report_omission(facts: dict[str, Any], name: str, reason: str) -> None:
    facts["left_out"].append({"file": name, "reason": reason})
    warn(f"no {name} in the merged artifact: {reason}")


def _find_statistics(artifact: Path) -> Path | None:
    """Return the folder of moments that the artifact was made from; None if it is not in its run's folder."""
    if (run := Workspace.open_existing(artifact.resolve().parent)) is None:
        return None
    candidates = [run.folder(stage) / STATISTICS for stage in ("prehab", "calibrate") if run.has(stage)]
    return next((path for path in candidates if path.is_dir()), None)


def _layer_metrics(model: PreTrainedModel, statistics: Statistics) -> Any:
    """Return a function from a layer's name to its second moments of inputs and of gradients, or (None, None)."""
    layers, damping = low_rank_layers(model), TruncateConfig().gradient_shrinkage

    def metric(name: str) -> tuple[Tensor | None, Tensor | None]:
        if name not in statistics.groups:
            return None, None
        # Not centred: a merge cannot change the bias, so the mean error counts too.
        layer = layer_metric(name, layers[name], statistics, damping, fold_mean=False)
        return layer.second_moment, layer.gradient_moment

    return metric


def _example(model: PreTrainedModel, task: Task, options: ExportOptions) -> Batch:
    """Return example inputs of the shapes that the artifact was exported with."""
    if options.image_size is None:
        return text_inputs(model, None).tensors
    shape = (BATCH, options.channels or 3, *options.image_size)
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(options.dtype)}
