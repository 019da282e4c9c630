"""The ONNX graph of a model, held to the model's own answers."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from converters.errors import InputError
from converters.onnx.export import OnnxExport, export_onnx
from converters.onnx.modes import FULL
from prehab_export.deployment.parity import Reference, check_graph
from prehab_export.inputs import Task, sample_count
from prehab_export.system import ParityError, warn


def export_exact(
    model: PreTrainedModel,
    path: Path,
    task: Task,
    reference: Reference,
    text_inputs: Sequence[str] | None,
    threads: int,
    kv_cache: str = FULL,
    fuse: bool = True,
) -> OnnxExport:
    """The ONNX graph, fused where that is asked for and exact; plain, and said so, where it is not.

    A fusion that does not fit an architecture must cost speed, never correctness.

    Raises:
        ParityError: the plain graph is not exact either.
    """
    pixels = reference.batches[0].get("pixel_values")
    size = None if pixels is None else (pixels.shape[-2], pixels.shape[-1])
    samples = max(reference.batches, key=sample_count)
    write = partial(
        export_onnx,
        model,
        path,
        task.name,
        text_inputs=text_inputs,
        samples=samples,
        image_size=size,
        kv_cache=kv_cache,
    )
    try:
        export = write(fuse=fuse)
        check_graph(reference, task, path, threads)
    except InputError:
        raise
    except (ParityError, RuntimeError) as error:
        if not fuse:
            raise
        warn(f"exporting without fusion, since the fused graph does not serve: {error}")
        export = write(fuse=False)
        check_graph(reference, task, path, threads)
    return export
