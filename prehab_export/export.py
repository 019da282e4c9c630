"""Writing the deployable folder and its dense twin, each with the answers that verification will hold it to."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from converters.folder import from_pretrained, save_folder
from converters.genai import write_genai_config
from converters.onnx.export import OnnxExport, export_onnx
from converters.onnx.modes import FULL
from prehab_export.errors import InputError, ParityError
from prehab_export.parity import Reference, check_graph, reference_batches, reference_of, save_reference
from prehab_export.progress import warn
from prehab_export.session import Session
from prehab_export.tasks import Task
from prehab_export.workspace import write_json

# Digests of every tensor of a factored model as it was in memory, beside the folder it was written to.
DIGESTS = "digests.json"


def export_artifact(session: Session, folder: Path) -> None:
    """``model/`` (Hugging Face folder with ``onnx/model.onnx`` inside) and the reference of the model in memory."""
    model = from_pretrained(session.factored_folder(), trust_remote_code=session.config.trust_remote_code)
    # What the reloaded artifact must equal is the model that truncation or rehab held, not a copy read back from disk.
    digests = json.loads((session.factored_folder().parent / DIGESTS).read_text(encoding="utf-8"))
    export_model(session, model, folder, digests)


def export_model(session: Session, model: PreTrainedModel, folder: Path, digests: dict[str, str]) -> None:
    """`export_artifact` of a model at hand, whose tensors are to have these digests."""
    save_folder(model, folder / "model", session.fresh_processor())
    graph = Path("onnx", "model.onnx")
    export = _export_graph(session, model, folder, folder / "model" / graph, digests, session.config.kv_cache)
    if session.task.name == "text-generation" and not write_genai_config(model, folder / "model", graph, export.inputs):
        warn("no genai_config.json, since onnxruntime-genai knows no such cache")


def export_baseline(session: Session, folder: Path) -> None:
    """``onnx/model.onnx`` of the dense model, made in just the same way, and the dense model's metric."""
    model = session.load_dense()
    _export_graph(session, model, folder, folder / "onnx" / "model.onnx")
    metrics = session.metrics(model, session.data.evaluation, "dense model, PyTorch")
    write_json(folder / "metrics.json", asdict(metrics))


def _export_graph(
    session: Session,
    model: PreTrainedModel,
    folder: Path,
    path: Path,
    digests: dict[str, str] | None = None,
    kv_cache: str = FULL,
) -> OnnxExport:
    batches = reference_batches(session.data.evaluation, session.task, model)
    reference = reference_of(model, session.task, batches)
    if digests is not None:
        reference = replace(reference, digests=digests)
    save_reference(reference, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_text = session.task.name != "image-classification"
    names = session.processor.model_input_names if is_text else None
    export = export_exact(model, path, session.task, reference, names, session.threads, kv_cache)
    for warning in export.warnings:
        warn(warning)
    write_json(folder / "export.json", {key: value for key, value in asdict(export).items() if key != "path"})
    return export


def export_exact(
    model: PreTrainedModel,
    path: Path,
    task: Task,
    reference: Reference,
    text_inputs: Sequence[str] | None,
    threads: int,
    kv_cache: str = FULL,
) -> OnnxExport:
    """The ONNX graph, fused where that is exact; plain, and said so, where it is not.

    A fusion that does not fit an architecture must cost speed, never correctness.

    Raises:
        ParityError: the plain graph is not exact either.
    """
    pixels = reference.batches[0].get("pixel_values")
    size = None if pixels is None else (pixels.shape[-2], pixels.shape[-1])
    write = partial(export_onnx, model, path, task.name, text_inputs=text_inputs, image_size=size, kv_cache=kv_cache)
    try:
        export = write()
        check_graph(reference, task, path, threads)
    except InputError:
        raise
    except (ParityError, RuntimeError) as error:
        warn(f"exporting without fusion, since the fused graph does not serve: {error}")
        export = write(fuse=False)
        check_graph(reference, task, path, threads)
    return export
