"""The ONNX graph of a model, held to the model's own answers."""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from converters.errors import InputError
from converters.onnx.export import OnnxExport, export_onnx
from converters.onnx.form import GraphForm
from prehab_export.deployment.parity import Reference, check_graph
from prehab_export.inputs import Task, sample_count
from prehab_export.system import ParityError, warn


def export_exact(
    model: PreTrainedModel, task: Task, path: Path, form: GraphForm, reference: Reference, *, threads: int
) -> OnnxExport:
    """The ONNX graph, fused where that is asked for and exact; plain, and said so, where it is not.

    A fusion that does not fit an architecture must cost speed, never correctness.

    Args:
        reference: what the graph is held to; its inputs are the samples that the model is traced with, and its images
            give the graph's size.

    Raises:
        ParityError: the plain graph is not exact either.
    """
    pixels = reference.batches[0].get("pixel_values")
    if pixels is not None:
        form = replace(form, image_size=(pixels.shape[-2], pixels.shape[-1]))
    samples = max(reference.batches, key=sample_count)
    try:
        export = export_onnx(model, task.name, path, form, samples=samples)
        check_graph(reference, task, path, threads)
    except InputError:
        raise
    except (ParityError, RuntimeError) as error:
        if not form.fuse:
            raise
        warn(f"exporting without fusion, since the fused graph does not serve: {error}")
        export = export_onnx(model, task.name, path, replace(form, fuse=False), samples=samples)
        check_graph(reference, task, path, threads)
    return export
