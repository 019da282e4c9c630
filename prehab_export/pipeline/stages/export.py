"""The export of the artifact and of the dense model, each with reference answers for verification."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from converters.dtypes import DTYPES, cast_weights
from converters.folder import from_pretrained, save_folder
from converters.genai import write_genai_config
from converters.number_formats import NUMBER_FORMATS
from converters.onnx.export import OnnxExport
from converters.onnx.form import GraphForm
from converters.onnx.modes import FULL
from prehab_export.config import NEVER
from prehab_export.deployment import (
    Reference,
    check_tensor_digests,
    export_exact,
    load_mapped,
    load_reference,
    reference_batches,
    reference_of,
    save_reference,
    tensor_digests,
)
from prehab_export.inputs import WeightFiles, has_half_tables, weight_files, widen_on_use
from prehab_export.pipeline.session import Session
from prehab_export.system import say, warn, write_json

# The file of digests of a factored model's tensors in memory, beside the model's folder.
DIGESTS = "digests.json"


def export_artifact(session: Session, folder: Path) -> None:
    """Write ``model/`` (a Hugging Face folder that contains ``onnx/model.onnx``) and the model's reference answers.

    Raises:
        ParityError: the model on disk differs from the one that truncation or training had in memory.
    """
    source = session.factored_folder()
    model = load_mapped(source, trust_remote_code=session.config.trust_remote_code)
    digests = json.loads((source.parent / DIGESTS).read_text(encoding="utf-8"))
    check_tensor_digests(digests, tensor_digests(model, torch.float32))
    _write_folder(session, model, folder)
    del model  # the graph is made from the folder, whose weights are mapped and not in memory
    _write_graph(session, folder)


def export_model(session: Session, model: PreTrainedModel, folder: Path) -> None:
    """Export a model in memory like `export_artifact`, and round its weights to the artifact's dtype in place."""
    widen_on_use(model)
    _write_folder(session, model, folder)
    _write_graph(session, folder)


def _write_folder(session: Session, model: PreTrainedModel, folder: Path) -> None:
    """Write ``model/`` without a graph, and the reference answers of the model, which computes in float32.

    The weights are rounded to the artifact's dtype in place before the model answers.
    """
    cast_weights(model, DTYPES[session.artifact_dtype])
    save_folder(model, folder / "model", session.fresh_processor())
    save_reference(_make_reference(session, model), folder)


def _write_graph(session: Session, folder: Path) -> None:
    """Write the graph of the folder in ``model/``, and the facts about both.

    The graph is made from the rounded weights in the folder, so that the folder and all graphs compute the same.

    Raises:
        ParityError: the folder holds other weights than the model had in memory, or the graph computes something else.
    """
    trust, kv_cache = session.config.trust_remote_code, session.config.kv_cache
    reference = load_reference(folder)
    model = load_mapped(folder / "model", trust_remote_code=trust)
    check_tensor_digests(reference.digests, tensor_digests(model))
    if kv_cache != FULL:  # latents are found by comparing what parts of the model compute
        model = from_pretrained(folder / "model", dtype=torch.float32, trust_remote_code=trust)
    graph = Path("onnx", "model.onnx")
    export = _export_graph(session, model, folder / "model" / graph, reference, kv_cache)
    files = weight_files(str(folder / "model"))
    facts = {"dtype": session.artifact_dtype, "weight_bytes": files.bytes}
    _write_facts(folder, export, facts, [*_size_warnings(files, export.bytes, session.weights), *export.warnings])
    if session.task.name == "text-generation" and not write_genai_config(model, folder / "model", graph, export.inputs):
        warn("no genai_config.json is written, because onnxruntime-genai does not support this kind of cache")


def _size_warnings(compressed: WeightFiles, graph_bytes: int, source: WeightFiles) -> list[str]:
    """Return warnings if the compressed weights or the graph are no smaller than the source's weights."""
    source_size = f"the source's weights ({source.bytes / 1e6:.1f} MB of {source.dtype})"
    warnings = []
    if compressed.bytes >= source.bytes:
        is_wider = NUMBER_FORMATS[compressed.dtype].bytes > NUMBER_FORMATS[source.dtype].bytes
        advice = "--dtype auto keeps the source's number format" if is_wider else "remove more, with a higher --ratio"
        compressed_size = f"the compressed weights ({compressed.bytes / 1e6:.1f} MB of {compressed.dtype})"
        warnings.append(f"{compressed_size} are not smaller than {source_size}; {advice}")
    if graph_bytes >= source.bytes:
        warnings.append(
            f"the graph ({graph_bytes / 1e6:.1f} MB of float32) is not smaller than {source_size}; "
            "--quantize float16, int8 or int4 makes smaller ones"
        )
    return warnings


def export_baseline(session: Session, folder: Path) -> None:
    """Write ``onnx/model.onnx`` of the dense model, exported in the same way, and its metric.

    If the run is to have no dense graph, write only the metric of the model in PyTorch, and why there is no graph.
    """
    model = session.load_dense(as_stored=True)
    if has_half_tables(model):
        model = session.load_dense()
    facts = {"dtype": session.weights.dtype, "weight_bytes": session.weights.bytes}
    if (missing := session.missing_dense_graph) is not None:
        if missing.cause == NEVER:
            say(f"  no dense graph: {missing.reason}")
        else:
            warn(f"no dense graph, so no speedups over it: {missing.reason}; --dense-graph always makes it")
        write_json(folder / "export.json", facts | {"missing_graph": missing.reason, "warnings": []})
        in_pytorch = session.metrics(model, session.data.evaluation, "dense model, PyTorch")
        write_json(folder / "metrics.json", asdict(in_pytorch))
        return
    reference = _make_reference(session, model)
    save_reference(reference, folder)
    export = _export_graph(session, model, folder / "onnx" / "model.onnx", reference)
    _write_facts(folder, export, facts, export.warnings)
    metrics = session.graph_metrics(folder / "onnx" / "model.onnx", "dense model, ONNX Runtime")
    write_json(folder / "metrics.json", asdict(metrics))


def _make_reference(session: Session, model: PreTrainedModel) -> Reference:
    """Return the answers of the model in memory, which the written model and graph must reproduce."""
    return reference_of(model, session.task, reference_batches(model, session.task, session.data.evaluation))


def _export_graph(
    session: Session, model: PreTrainedModel, path: Path, reference: Reference, kv_cache: str = FULL
) -> OnnxExport:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_text = session.task.name != "image-classification"
    names = session.processor.model_input_names if is_text else None
    form = GraphForm(text_inputs=names, kv_cache=kv_cache, widen=True)
    return export_exact(model, session.task, path, form, reference, threads=session.threads)


def _write_facts(folder: Path, export: OnnxExport, facts: dict[str, Any], warnings: Sequence[str]) -> None:
    """Write ``export.json`` and show its warnings to the user."""
    for warning in warnings:
        warn(warning)
    facts = asdict(export) | facts | {"warnings": list(warnings)}
    write_json(folder / "export.json", {key: value for key, value in facts.items() if key != "path"})
