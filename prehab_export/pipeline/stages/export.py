"""Writing the deployable folder and its dense twin, each with the answers that verification will hold it to."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
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
from prehab_export.deployment import (
    Reference,
    check_tensor_digests,
    export_exact,
    reference_batches,
    reference_of,
    save_reference,
    tensor_digests,
)
from prehab_export.inputs import WeightFiles, weight_files
from prehab_export.pipeline.session import Session
from prehab_export.system import warn, write_json

# Digests of every tensor of a factored model as it was in memory, beside the folder it was written to.
DIGESTS = "digests.json"


def export_artifact(session: Session, folder: Path) -> None:
    """``model/`` (Hugging Face folder with ``onnx/model.onnx`` inside) and the reference of the model in memory.

    Raises:
        ParityError: the model on disk is not the one that truncation or training held.
    """
    model = from_pretrained(session.factored_folder(), trust_remote_code=session.config.trust_remote_code)
    held = json.loads((session.factored_folder().parent / DIGESTS).read_text(encoding="utf-8"))
    check_tensor_digests(held, tensor_digests(model))
    export_model(session, model, folder)


def export_model(session: Session, model: PreTrainedModel, folder: Path) -> None:
    """`export_artifact` of a model at hand, in float32; its weights are rounded to the artifact's dtype, in place.

    All that comes after is of the rounded weights, so that the folder, its graph and graphs made from that compute the
    same.
    """
    dtype = DTYPES[session.artifact_dtype]
    cast_weights(model, dtype)
    digests = tensor_digests(model)
    save_folder(model, folder / "model", session.fresh_processor())
    cast_weights(model, torch.float32)
    written = weight_files(str(folder / "model"))
    facts = {"dtype": session.artifact_dtype, "weight_bytes": written.bytes}
    graph = Path("onnx", "model.onnx")
    reference = replace(_reference(session, model), digests=digests)
    save_reference(reference, folder)
    export = _export_graph(session, model, folder / "model" / graph, reference, session.config.kv_cache)
    _write_facts(folder, export, facts, [*_saves_nothing(written, export.bytes, session.weights), *export.warnings])
    if session.task.name == "text-generation" and not write_genai_config(model, folder / "model", graph, export.inputs):
        warn("no genai_config.json, since onnxruntime-genai knows no such cache")


def _saves_nothing(written: WeightFiles, graph_bytes: int, source: WeightFiles) -> list[str]:
    """Warnings where what was written is no smaller than what it was made from."""
    of_source = f"the source's weights ({source.bytes / 1e6:.1f} MB of {source.dtype})"
    warnings = []
    if written.bytes >= source.bytes:
        wider = NUMBER_FORMATS[written.dtype].bytes > NUMBER_FORMATS[source.dtype].bytes
        advice = "--dtype auto keeps the source's number format" if wider else "remove more, with a higher --ratio"
        of_written = f"the compressed weights ({written.bytes / 1e6:.1f} MB of {written.dtype})"
        warnings.append(f"{of_written} are not smaller than {of_source}; {advice}")
    if graph_bytes >= source.bytes:
        warnings.append(
            f"the graph ({graph_bytes / 1e6:.1f} MB of float32) is not smaller than {of_source}; "
            "--quantize float16, int8 or int4 makes smaller ones"
        )
    return warnings


def export_baseline(session: Session, folder: Path) -> None:
    """``onnx/model.onnx`` of the dense model, made in just the same way, and the dense model's metric."""
    model = session.load_dense()
    facts = {"dtype": session.weights.dtype, "weight_bytes": session.weights.bytes}
    reference = _reference(session, model)
    save_reference(reference, folder)
    export = _export_graph(session, model, folder / "onnx" / "model.onnx", reference)
    _write_facts(folder, export, facts, export.warnings)
    metrics = session.metrics(model, session.data.evaluation, "dense model, PyTorch")
    write_json(folder / "metrics.json", asdict(metrics))


def _reference(session: Session, model: PreTrainedModel) -> Reference:
    """What the model in memory answers, for all that is written to be held to."""
    return reference_of(model, session.task, reference_batches(model, session.task, session.data.evaluation))


def _export_graph(
    session: Session, model: PreTrainedModel, path: Path, reference: Reference, kv_cache: str = FULL
) -> OnnxExport:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_text = session.task.name != "image-classification"
    names = session.processor.model_input_names if is_text else None
    form = GraphForm(text_inputs=names, kv_cache=kv_cache)
    return export_exact(model, session.task, path, form, reference, threads=session.threads)


def _write_facts(folder: Path, export: OnnxExport, facts: dict[str, Any], warnings: Sequence[str]) -> None:
    """``export.json``; what is to be warned of is said too."""
    for warning in warnings:
        warn(warning)
    told = asdict(export) | facts | {"warnings": list(warnings)}
    write_json(folder / "export.json", {key: value for key, value in told.items() if key != "path"})
