"""ONNX Runtime's own file format, for builds of it that are cut down to one model: phones and boards.

``.ort`` files are what a minimal build reads; the configuration beside one names the operators (and their types) that
the build must keep. Both come from ONNX Runtime's own tools, and so does the verdict whether a phone's accelerator
would help.
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
    """``model`` (.ort) and ``operators``, the configuration for a build that runs nothing else."""

    model: Path
    operators: Path


def write_ort(graph: Path, folder: Path) -> OrtFiles:
    """Write ``<stem>.ort`` and ``<stem>.required_operators_and_types.config`` into ``folder``, both or none; ``<stem>``
    is that of the file that the graph is, whatever link leads there.

    The graph is optimised as any session on a CPU would do it, once and for all.

    Raises:
        InputError: no such graph, or one that the format cannot hold.
        OSError: the disk is full.
    """
    if not graph.is_file():
        raise InputError(f"no ONNX graph at {graph}")
    graph = graph.resolve()  # as the tool does
    size = sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))
    if size > LARGEST_BYTES:
        raise InputError(
            f"{graph.name} is {size / 1e9:.1f} GB with its weights, and an .ort file ends at 2 GB; quantise it, or "
            "leave out --ort"
        )
    kinds = {tensor.data_type for tensor in onnx.load(graph, load_external_data=False).graph.initializer}
    if kinds & {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}:
        raise InputError(f"{graph.name} holds 4-bit tables, which an .ort file has no type for; int8 can be held")
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    files = OrtFiles(folder / f"{graph.stem}.ort", folder / f"{graph.stem}.required_operators_and_types.config")
    with published_files(files.operators, files.model) as own, quiet(), explaining_full_disk(own):
        convert_onnx_models_to_ort(
            graph, output_dir=own, optimization_styles=[OptimizationStyle.Fixed], enable_type_reduction=True
        )
        _name_no_folder(own / files.operators.name, own / files.model.name)
    return files


def _name_no_folder(operators: Path, model: Path) -> None:
    """The tool notes where it found the model, which is one machine's business."""
    text = operators.read_text(encoding="utf-8").replace(str(model.resolve()), model.name)
    operators.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class MobileVerdict:
    """Whether NNAPI or CoreML may work well with a graph, and what the checker said of each."""

    suits_an_accelerator: bool
    said: tuple[str, ...]


def mobile_verdict(graph: Path) -> MobileVerdict:
    """The verdict of ONNX Runtime's mobile usability checker."""
    from onnxruntime.tools.mobile_helpers.usability_checker import analyze_model

    said: list[str] = []
    logger = logging.Logger("mobile usability", logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    suits = analyze_model(graph, logger=logger)
    # The first line names the file, which is one machine's business; others are rules across the page.
    lines = (" ".join(line.split()) for line in said[1:] if str(graph.parent) not in line)
    return MobileVerdict(bool(suits), tuple(line for line in lines if line.strip("-= ")))
