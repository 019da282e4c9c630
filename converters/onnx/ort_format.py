"""Write ONNX Runtime's own file format, for builds that are reduced to one model, on phones and boards.

A minimal build reads ``.ort`` files. The configuration beside such a file names the operators, and their types, that
the build must include. ONNX Runtime's own tools write both, and they also judge whether a phone's accelerator would
help.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import onnx

from converters.errors import InputError
from converters.full_disk import explaining_full_disk
from converters.onnx.quiet import quiet
from converters.publishing import published_files

# A flatbuffer's offsets are 32 bits wide.
LARGEST_BYTES = 2_000_000_000


@dataclass(frozen=True)
class OrtFiles:
    """The written files: ``model`` (.ort), and ``operators``, the configuration for a build that runs only this
    model."""

    model: Path
    operators: Path


def write_ort(graph: Path, folder: Path) -> OrtFiles:
    """Write ``<stem>.ort`` and ``<stem>.required_operators_and_types.config`` into ``folder``, both or neither.

    ``<stem>`` is that of the graph's file, after following links. The graph is optimised as any session on a CPU would
    do it, but once and for all.

    Raises:
        InputError: no such graph, or one that the format does not support.
        OSError: the disk is full.
    """
    if not graph.is_file():
        raise InputError(f"no ONNX graph at {graph}")
    graph = graph.resolve()  # as ONNX Runtime's tool does
    size = sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))
    if size > LARGEST_BYTES:
        raise InputError(
            f"{graph.name} is {size / 1e9:.1f} GB with its weights, and an .ort file ends at 2 GB; quantise it, or "
            "omit --ort"
        )
    kinds = {tensor.data_type for tensor in onnx.load(graph, load_external_data=False).graph.initializer}
    if kinds & {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}:
        raise InputError(f"{graph.name} has 4-bit tables, for which .ort files have no type; use int8 instead")
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    files = OrtFiles(folder / f"{graph.stem}.ort", folder / f"{graph.stem}.required_operators_and_types.config")
    with published_files(files.operators, files.model) as work, quiet(), explaining_full_disk(work):
        convert_onnx_models_to_ort(
            graph, output_dir=work, optimization_styles=[OptimizationStyle.Fixed], enable_type_reduction=True
        )
        _remove_folder(work / files.operators.name, work / files.model.name)
    return files


def _remove_folder(operators: Path, model: Path) -> None:
    """Remove the model's folder from the configuration: the tool writes the whole path, which only means something on
    this machine."""
    text = operators.read_text(encoding="utf-8").replace(str(model.resolve()), model.name)
    operators.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class MobileVerdict:
    """Whether NNAPI or CoreML may work well with a graph, and the checker's messages."""

    suits_an_accelerator: bool
    said: tuple[str, ...]


def mobile_verdict(graph: Path) -> MobileVerdict:
    """Return the verdict of ONNX Runtime's mobile usability checker."""
    from onnxruntime.tools.mobile_helpers.usability_checker import analyze_model

    messages: list[str] = []
    logger = logging.Logger("mobile usability", logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    suits = analyze_model(graph, logger=logger)
    # The first line names the file by its path on this machine; some others are separator lines.
    lines = (" ".join(line.split()) for line in messages[1:] if str(graph.parent) not in line)
    return MobileVerdict(bool(suits), tuple(line for line in lines if line.strip("-= ")))
