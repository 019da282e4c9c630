"""Smaller weights for a graph that is there already: int8, int4 and float16, with ONNX Runtime's own quantisers.

================  ==========================  ==========================================================
mode              weights                     products
================  ==========================  ==========================================================
``int8``          int8, one scale a column    in int8; activations scaled as they come (dynamic)
``int8-tables4``  as ``int8``, but embedding  as ``int8``
                  tables in blocks of int4
``int8-static``   int8, one scale a column    in int8; activations by ranges found on a sample (QDQ)
``int8-blocks``   int8, one scale a block     in int8 or float32, as the machine's kernels have it
``int4``          int4, one scale a block     in int8 or float32, as the machine's kernels have it
``float16``       float16                     in float32: half the file, the same speed
================  ==========================  ==========================================================

Products with a weight are quantised, and embedding tables; products of activations stay as they are, and so do
convolutions: with int8 weights, ONNX Runtime's takes three times as long as in float32 on the patches of a ViT-B/16
(``benchmarks/encoder_operators.py``). A block is 32 inputs of one output: ranks in multiples of it waste nothing.
Weights that are multiplied head by head have three axes, and there the kernels know one scale a weight only.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import RemoveUnusedNodesPass

from converters.errors import InputError
from converters.onnx.modes import BLOCK, MODES
from converters.onnx.quiet import quiet

# What int8 quantises; products of which neither side is a weight are left out by an option.
INT8_OPERATORS = ["MatMul", "Gemm", "Gather"]

# Smaller tensors gain nothing.
LEAST_ELEMENTS = 1024

Feeds = Mapping[str, np.ndarray]


def quantize_graph(source: Path, target: Path, mode: str, sample: Callable[[], Iterable[Feeds]] | None = None) -> Path:
    """Write ``source`` again with smaller weights; returns ``target``, which appears only when it is complete.

    Args:
        sample: for ``int8-static``, what to run the graph on; called once.

    Raises:
        InputError: an unknown mode, no such graph, not a graph, or no sample where one is needed.
    """
    if mode not in MODES:
        raise InputError(f"unknown quantisation {mode!r}; expected one of {', '.join(MODES)}")
    _check(source)
    if mode == "int8-static" and sample is None:
        raise InputError("int8-static needs a sample to find the ranges of activations on")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        with quiet():
            _quantize(source, folder / target.name, mode, sample)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == target.name):  # the graph last
            os.replace(file, target.with_name(file.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def _check(source: Path) -> None:
    if not source.is_file():
        raise InputError(f"no ONNX graph at {source}")
    try:
        onnx.load(source, load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{source} is not an ONNX file: {error}") from error


def _quantize(source: Path, target: Path, mode: str, sample: Callable[[], Iterable[Feeds]] | None) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    external = source.with_name(f"{source.name}_data").is_file()
    by_head = [] if mode == "float16" else _products_by_head(source)
    shared: dict[str, Any] = {
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": external,
        "op_types_to_quantize": INT8_OPERATORS,
        "nodes_to_exclude": by_head,
    }
    if mode == "int8":
        quantize_dynamic(source, target, extra_options={"MatMulConstBOnly": True}, **shared)
    elif mode == "int8-tables4":
        tables = _in_blocks(source, 4, ("Gather",))
        quantize_dynamic(tables, target, extra_options={"MatMulConstBOnly": True}, **shared)
    elif mode == "int8-static":
        assert sample is not None
        quantize_static(
            source,
            target,
            _Reader(sample()),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            extra_options={"MatMulConstBOnly": True},
            **shared,
        )
    elif mode == "float16":
        _store_in_float16(source, target, external)
    else:
        _quantize_blocks(source, target, mode, external)
    if by_head:
        shared |= {"per_channel": False, "nodes_to_exclude": None, "nodes_to_quantize": by_head}
        quantize_dynamic(target, target, extra_options={"MatMulConstBOnly": True}, **shared)


def _products_by_head(source: Path) -> list[str]:
    """Names of the products with a weight of three axes."""
    graph = onnx.load(source, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 3}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]


class _Reader:
    """A sample as onnxruntime.quantization reads it."""

    def __init__(self, sample: Iterable[Feeds]) -> None:
        self._feeds = iter(sample)

    def get_next(self) -> Feeds | None:
        return next(self._feeds, None)


def _quantize_blocks(source: Path, target: Path, mode: str, external: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.onnx_model import ONNXModel

    if mode == "int4":
        ONNXModel(_in_blocks(source, 4, ("MatMul", "Gather"))).save_model_to_file(str(target), external)
    else:  # for tables there are blocks of 4 bits only
        quantize_dynamic(
            _in_blocks(source, 8, ("MatMul",)), target, op_types_to_quantize=["Gather"], weight_type=QuantType.QInt8,
            use_external_data_format=external,
        )  # fmt: skip


def _in_blocks(source: Path, bits: int, kinds: tuple[str, ...]) -> onnx.ModelProto:
    """The graph with the weights of these kinds of operators in blocks."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    # Accuracy level 4 lets the kernels multiply in int8, which is what makes them fast.
    quantizer = MatMulNBitsQuantizer(
        onnx.load(source), bits, BLOCK, is_symmetric=True, accuracy_level=4,
        op_types_to_quantize=kinds, quant_axes=(("MatMul", 0), ("Gather", 1)),
    )  # fmt: skip
    quantizer.process()
    return quantizer.model.model


def _store_in_float16(source: Path, target: Path, external: bool) -> None:
    """Weights in float16, each cast to float32 as a session opens; values beyond float16's range stay as they are."""
    model = ir.load(source)
    graph = model.graph
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < LEAST_ELEMENTS:
            continue
        array = tensor.numpy()
        if np.abs(array).max() > np.finfo(np.float16).max:
            continue
        name = f"{value.name}.float16"
        half = ir.Value(
            name=name,
            shape=ir.Shape(list(array.shape)),
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.tensor(array.astype(np.float16), name=name),
        )
        graph.register_initializer(half)
        cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT})
        graph.insert_before(graph[0], cast)
        value.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[str(value.name)]
    RemoveUnusedNodesPass()(model)
    ir.save(model, target, external_data=f"{target.name}_data" if external else None)
