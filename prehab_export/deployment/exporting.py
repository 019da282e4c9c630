"""Exports a model to an ONNX graph and checks the graph against the model's own outputs."""

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
    """Export the ONNX graph, fused if the form asks for it. If the fused graph is not exact, export the plain graph.

    A fusion that does not suit an architecture may cost speed, never correctness; the fallback prints a warning.

    Args:
        reference: inputs and outputs to check the graph against. The model is traced with these inputs; images also
            set the graph's image size.

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
        warn(f"exporting without fusion, because the fused graph cannot be used: {error}")
        export = export_onnx(model, task.name, path, replace(form, fuse=False), samples=samples)
        check_graph(reference, task, path, threads)
    return export
