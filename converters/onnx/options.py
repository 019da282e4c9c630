"""Read the options that a graph was exported with from the graph itself, which cannot get lost or out of date."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from converters.errors import InputError
from converters.onnx.export import FUSED_OPSET
from converters.onnx.form import GraphForm
from converters.onnx.latent import kind_of_cache
from converters.onnx.modes import FILE_NAMES


@dataclass(frozen=True)
class ExportOptions:
    """The options for exporting another model in the same form; see `converters.onnx.export.export_onnx`.

    inputs: names of the graph's inputs, in order.
    image_size: height and width in pixels; None for text.
    channels: channels of an image; None for text.
    dtype: dtype of the logits.
    """

    inputs: tuple[str, ...]
    image_size: tuple[int, int] | None
    channels: int | None
    kv_cache: str
    fuse: bool
    dtype: torch.dtype

    @property
    def form(self) -> GraphForm:
        """These options as `export_onnx` takes them."""
        return GraphForm(self.inputs, self.image_size, self.fuse, self.kv_cache)


def options_of(graph: Path) -> ExportOptions:
    """Return the options that `export_onnx` made this graph with.

    Raises:
        InputError: the graph's images have no fixed size.
    """
    model = onnx.load(graph, load_external_data=False)
    inputs = {value.name: value for value in model.graph.input}
    channels, image_size = None, None
    if "pixel_values" in inputs:
        _, channels, height, width = (axis.dim_value for axis in inputs["pixel_values"].type.tensor_type.shape.dim)
        if not (channels and height and width):
            raise InputError(f"the images of {graph} have no fixed size; export it with one")
        image_size = (height, width)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    (logits,) = (value for value in model.graph.output if value.name == "logits")
    return ExportOptions(
        inputs=tuple(inputs),
        image_size=image_size,
        channels=channels,
        kv_cache=kind_of_cache(inputs),
        fuse=opset >= FUSED_OPSET,
        dtype=to_torch_dtype(ir.DataType(logits.type.tensor_type.elem_type)),
    )


def modes_beside(graph: Path) -> Sequence[str]:
    """Return the quantisation modes for which there is a file beside the graph."""
    return [mode for mode, name in FILE_NAMES.items() if graph.with_name(name).is_file()]
