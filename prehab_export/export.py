"""Writing the deployable folder and its dense twin, each with the answers that verification will hold it to."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from converters.folder import from_pretrained, save_folder
from converters.onnx.export import OnnxExport, export_onnx
from converters.onnx.session import open_session
from prehab_export.parity import TOLERANCE, Reference, compare, reference_batches, reference_of, save_reference
from prehab_export.progress import say
from prehab_export.session import Session
from prehab_export.workspace import write_json


def export_artifact(session: Session, folder: Path) -> None:
    """``model/`` (Hugging Face folder with ``onnx/model.onnx`` inside) and the reference of the model in memory."""
    model = from_pretrained(session.factored_folder(), trust_remote_code=session.config.trust_remote_code)
    save_folder(model, folder / "model", session.processor)
    _export_graph(session, model, folder, folder / "model" / "onnx" / "model.onnx")


def export_baseline(session: Session, folder: Path) -> None:
    """``onnx/model.onnx`` of the dense model, made in just the same way, and the dense model's metric."""
    model = session.load_dense()
    _export_graph(session, model, folder, folder / "onnx" / "model.onnx")
    metrics = session.metrics(model, session.data.evaluation, "dense model, PyTorch")
    write_json(folder / "metrics.json", asdict(metrics))


def _export_graph(session: Session, model: PreTrainedModel, folder: Path, path: Path) -> None:
    reference = reference_of(model, session.task, reference_batches(session.data.evaluation, session.task))
    save_reference(reference, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_text = session.task.name != "image-classification"
    names = session.processor.model_input_names if is_text else None
    export = export_onnx(model, path, session.task.name, text_inputs=names)
    fused = True
    if not _holds(reference, session, path):
        # A fusion rule that does not fit this architecture must cost speed, never correctness.
        say("  [yellow]the fused graph is not exact for this model; exporting without fusion")
        export = export_onnx(model, path, session.task.name, text_inputs=names, fuse=False)
        fused = False
    write_json(folder / "export.json", _facts(export) | {"fused": fused})


def _holds(reference: Reference, session: Session, path: Path) -> bool:
    runtime = open_session(path, threads=session.config.bench.threads)
    return all(result.relative <= TOLERANCE for result in compare(reference, session.task, runtime))


def _facts(export: OnnxExport) -> dict[str, Any]:
    return {key: value for key, value in asdict(export).items() if key != "path"}
