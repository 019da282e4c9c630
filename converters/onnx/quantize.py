"""Quantise the weights of an existing graph to int8, int4 or float16.

================  =================================  ==========================================================
mode              products with a weight             activations
================  =================================  ==========================================================
``int8``          int8, one scale per column         scaled at run time (dynamic); products in int8
``int8-tables4``  as ``int8``                        as ``int8``
``int8-static``   int8, one scale per column         ranges measured on a sample (QDQ); products in int8
``int8-blocks``   int8, one scale per block          products in int8 or float32, depending on the machine's kernels
``int4``          int4, one scale per block          products in int8 or float32, depending on the machine's kernels
``float16``       float16                            float32: half the file, the same speed
================  =================================  ==========================================================

Embedding tables are stored in blocks in every integer mode, with 4 bits in ``int8-tables4`` and ``int4`` and 8 bits in
the others. An output layer that is tied to a table multiplies by the same bytes (see `converters.onnx.blocks`).

Products of activations are not quantised, and neither are convolutions: with int8 weights, that of ONNX Runtime takes
three times as long as in float32 on the patches of a ViT-B/16 (``benchmarks/encoder_operators.py``).
`converters.onnx.quantized_weights` finds which weights are not quantised.

A block of a product is 32 inputs of one output, so ranks in multiples of 32 waste nothing. Weights that are multiplied
head by head have three axes, for which the kernels only support one scale per weight.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import RemoveUnusedNodesPass

from converters.errors import InputError
from converters.full_disk import explaining_full_disk
from converters.onnx.blocks import plain_products, products_in_blocks, tables_in_blocks
from converters.onnx.modes import MODES
from converters.onnx.quiet import quiet
from converters.onnx.write import data_file, has_external_data, publish_graph
from converters.publishing import published_files

# Smaller weights gain nothing.
LEAST_ELEMENTS = 1024

# Mode → bits of embedding tables; and bits of products, for the modes that store products in blocks, too.
TABLE_BITS = {"int8": 8, "int8-tables4": 4, "int8-static": 8, "int8-blocks": 8, "int4": 4}
PRODUCT_BITS = {"int8-blocks": 8, "int4": 4}

Feeds = Mapping[str, np.ndarray]


def quantize_graph(
    source: Path,
    target: Path,
    mode: str,
    sample: Callable[[], Iterable[Feeds]] | None = None,
    *,
    may_grow: bool = False,
) -> Path:
    """Write ``source`` to ``target`` with smaller weights; returns ``target``, which only appears when it is complete.
    If the weights of ``source`` are in a file of their own, those of ``target`` are too, in ``<name>.onnx_data``.

    Args:
        sample: returns the inputs on which ``int8-static`` measures ranges; called once.
        may_grow: accept weights that become larger, as those of a single small product may.

    Raises:
        InputError: an unknown mode, no such graph, not a graph, no sample although one is needed, or weights that
            become larger.
        OSError: the disk is full.
    """
    if mode not in MODES:
        raise InputError(f"unknown quantisation {mode!r}; expected one of {', '.join(MODES)}")
    _check(source)
    if mode == "int8-static" and sample is None:
        raise InputError("int8-static needs a sample on which to measure the ranges of activations")
    with published_files(data_file(target), target) as folder, quiet(), explaining_full_disk(folder):
        model = ir.load(source)
        before = _weight_bytes(model)
        threshold = 0 if has_external_data(model) else None
        steps = folder / "steps"
        steps.mkdir()
        finished = _quantized(model, mode, sample, steps)
        if not may_grow:
            _refuse_larger(source, before, _weight_bytes(finished), mode)
        publish_graph(finished, folder / target.name, threshold, check=False)
    return target


def _check(source: Path) -> None:
    """Check that a graph exists and is an ONNX file.

    Raises:
        InputError: it does not, or it is not one.
    """
    if not source.is_file():
        raise InputError(f"no ONNX graph at {source}")
    try:
        onnx.load(source, load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{source} is not an ONNX file: {error}") from error


def _refuse_larger(source: Path, before: int, after: int, mode: str) -> None:
    # Weights are compared, not files: the operators around a few kB of weights may take more space than is saved.
    if after > before:
        raise InputError(
            f"{mode} makes the weights of {source} larger, {after:,} bytes instead of {before:,}: they are too small "
            "or too narrow for it; omit this mode"
        )


def _weight_bytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)


def _quantized(model: ir.Model, mode: str, sample: Callable[[], Iterable[Feeds]] | None, folder: Path) -> ir.Model:
    """The model with smaller weights. ``folder`` is for intermediate files, from which the model may read its weights
    later."""
    if mode == "float16":
        _store_in_float16(model)
        return model
    by_head = _products_by_head(model)
    tables_in_blocks(model, TABLE_BITS[mode])
    if mode in PRODUCT_BITS:
        products_in_blocks(model, PRODUCT_BITS[mode])
    else:
        model = _in_int8(model, sample if mode == "int8-static" else None, by_head, folder)
    return _by_head_in_int8(model, by_head, folder) if by_head else model


def _in_int8(
    model: ir.Model, sample: Callable[[], Iterable[Feeds]] | None, excluded: list[str], folder: Path
) -> ir.Model:
    """Quantise products to int8; activations by ranges measured on the sample or, without one, at run time."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    if sample is None:
        plain_products(model)
    before, after = folder / "before.onnx", folder / "after.onnx"
    publish_graph(model, before, check=False)
    shared: dict[str, Any] = {
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": data_file(before).is_file(),
        "nodes_to_exclude": excluded,
        "extra_options": {"MatMulConstBOnly": True},
    }
    if sample is None:
        quantize_dynamic(before, after, op_types_to_quantize=["MatMul"], **shared)
    else:
        quantize_static(
            before,
            after,
            _Reader(sample()),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            **shared,
        )
    return ir.load(after)


def _by_head_in_int8(model: ir.Model, names: list[str], folder: Path) -> ir.Model:
    """Quantise the named products, whose weights have three axes, to int8 with one scale per weight."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before, after = folder / "before-heads.onnx", folder / "after-heads.onnx"
    publish_graph(model, before, check=False)
    quantize_dynamic(
        before,
        after,
        op_types_to_quantize=["MatMul"],
        weight_type=QuantType.QInt8,
        use_external_data_format=data_file(before).is_file(),
        nodes_to_quantize=names,
        extra_options={"MatMulConstBOnly": True},
    )
    return ir.load(after)


def _products_by_head(model: ir.Model) -> list[str]:
    """The names of the products whose weight has three axes."""
    products = (node for node in model.graph.all_nodes() if node.op_type == "MatMul")
    return [
        str(node.name)
        for node in products
        if (weight := node.inputs[1]) is not None
        and weight.const_value is not None
        and len(weight.const_value.shape) == 3
    ]


class _Reader:
    """A sample in the form that onnxruntime.quantization reads."""

    def __init__(self, sample: Iterable[Feeds]) -> None:
        self._feeds = iter(sample)

    def get_next(self) -> Feeds | None:
        return next(self._feeds, None)


def _store_in_float16(model: ir.Model) -> None:
    """Store weights in float16, with a cast to float32 that runs when a session opens, in place. Weights with values
    beyond float16's range stay in float32."""
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
