"""Weights of a graph in blocks of whole numbers: embedding tables, output layers tied to them, and products.

A block is a run of inputs of one output, or of entries of one row of a table. It is stored as unsigned numbers q of 4
or 8 bits and a float32 step, and stands for ``(q − 2^(bits−1)) · step``. The largest entry of a block sets the step and
is the most negative number, of which there is one more than of positive ones; others are rounded to the nearest,
halves upwards. That is how ONNX Runtime's own quantiser rounds, and what `prehab_export.linalg` fits factors to.

Products become ``MatMulNBits``, look-ups ``GatherBlockQuantized``. The two read the same bytes in the same order, one
as outputs × blocks × bytes, the other as rows × bytes. So a table and the output layer that is tied to it are one
initialiser of two axes and one of steps; a ``Reshape`` that a session folds as it opens gives the product its third.

ONNX Runtime's kernel answers for ids beyond the table with other rows or zeros, where ``Gather`` refuses them. So ids
go through a ``Gather`` on the numbers from 0 to the last row first, which refuses them again, and takes the negative
ones for those from the end as before. The numbers are made by a ``Range`` that is folded too: a look-up of as many
integers as there are tokens is all that it costs.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from converters.onnx.modes import BLOCK
from converters.onnx.names import TRANSPOSED

MICROSOFT = "com.microsoft"
# Smaller tables gain nothing.
LEAST_ELEMENTS = 1024
# What a row of a table may be cut into: more entries a step cost 8 bits little accuracy.
_TABLE_BLOCKS = {4: (BLOCK, 16), 8: (128, 64, BLOCK, 16)}
# Lets the kernels multiply in int8, which is what makes them fast.
_ACCURACY_LEVEL = 4
# Rows of a weight that are rounded at a time.
_ROWS = 4096


@dataclass(frozen=True)
class Product:
    """``scale · x Wᵀ + bias`` with a weight W (outputs×inputs) of the graph, stored so or (``transposed``) as Wᵀ."""

    node: ir.Node
    weight: ir.Value
    transposed: bool
    scale: float = 1.0
    bias: ir.Value | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs, inputs."""
        first, second = _shape(self.weight)
        return (second, first) if self.transposed else (first, second)

    def matrix(self) -> NDArray[np.float32]:
        """W, without the scale."""
        stored = _array(self.weight)
        return stored.T if self.transposed else stored


def product_of(node: ir.Node) -> Product | None:
    """The product that this node is, if it is one with a float32 weight of two axes on its right."""
    if len(node.inputs) < 2 or (source := _weight_behind(node.inputs[1])) is None:
        return None
    weight, turned = source
    number, real = node.attributes.get_int, node.attributes.get_float
    if node.op_type == "MatMul" and node.domain == "":
        return Product(node, weight, not turned)
    by_rows = bool(number("transB", 0)) != turned
    if node.op_type == "FusedMatMul":
        if any(number(name, 0) for name in ("transA", "transBatchA", "transBatchB")):
            return None
        return Product(node, weight, not by_rows, real("alpha", 1.0))
    if node.op_type == "Gemm" and not number("transA", 0):
        product = Product(node, weight, not by_rows, real("alpha", 1.0))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None:
            return product
        if real("beta", 1.0) == 1 and _is_weight(bias) and _shape(bias) == product.shape[:1]:
            return Product(node, weight, not by_rows, product.scale, bias)
    return None


def tables_in_blocks(model: ir.Model, bits: int) -> None:
    """Store embedding tables, and output layers that hold the same numbers, in blocks of 4 or 8 bits; in place.

    A table stays as it is where it is small, where blocks would not be smaller, or where something else reads it too.
    """
    tables: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph.all_nodes():
        if _looks_up_rows(node) and node.inputs[0] is not None:
            tables.setdefault(node.inputs[0], []).append(node)
    products = _products(model.graph)
    for table, look_ups in tables.items():
        heads = [product for product in products if not product.transposed and product.weight is table]
        if _size(table) < LEAST_ELEMENTS or _readers(table) > {*look_ups, *(head.node for head in heads)}:
            continue
        width = _shape(table)[1]
        block = min(_TABLE_BLOCKS[bits], key=lambda block: _row_bytes(width, bits, block))
        if _row_bytes(width, bits, block) >= 4 * width:
            continue
        # The exporter may have folded the transpose of a small table that the output layer reads.
        heads += [product for product in products if product.weight is not table and _same(product, table)]
        packed, steps = _store(model, table, bits, block, three_axes=False)
        for node in look_ups:
            _look_up(model, node, packed, steps, (width, bits, block))
        if heads:
            shape = _register(model, f"{packed.name}_shape", np.array([_shape(table)[0], -(-width // block), -1]))
            blocks = ir.node("Reshape", [packed, shape])
            model.graph.insert_before(model.graph[0], blocks)
            for head in heads:
                _multiply(model, head, blocks.outputs[0], steps, (bits, block))
    RemoveUnusedNodesPass()(model)


def products_in_blocks(model: ir.Model, bits: int) -> None:
    """Store the weights of products in blocks of ``BLOCK`` inputs, where that is smaller; in place."""
    for products in _alike(model.graph):
        inputs = products[0].shape[1]
        if _row_bytes(inputs, bits, BLOCK) >= 4 * inputs:
            continue
        packed, steps = _store(model, products[0].weight, bits, BLOCK, products[0].transposed)
        for product in products:
            _multiply(model, product, packed, steps, (bits, BLOCK))
    RemoveUnusedNodesPass()(model)


def plain_products(model: ir.Model) -> None:
    """Write every product with a weight as ``MatMul`` and an ``Add`` of its bias, in place: ONNX Runtime's dynamic
    quantiser knows no other."""
    for products in _alike(model.graph):
        first, stored = products[0], products[0].weight
        if not first.transposed or first.scale != 1:
            array = np.ascontiguousarray(first.matrix().T * np.float32(first.scale))
            stored = _register(model, f"{stored.name}{'' if first.transposed else TRANSPOSED}", array)
        for product in products:
            new = [ir.node("MatMul", [product.node.inputs[0], stored])]
            if product.bias is not None:
                new.append(ir.node("Add", [new[0].outputs[0], product.bias]))
            _replace(product.node, new)
    RemoveUnusedNodesPass()(model)


def _products(graph: ir.Graph) -> list[Product]:
    found = (product_of(node) for node in graph.all_nodes())
    return [product for product in found if product is not None]


def _alike(graph: ir.Graph) -> list[list[Product]]:
    """Products by weight and the way it is read, of weights that nothing but products of one kind reads: another
    reader would keep the float32 weight beside the quantised one."""
    groups: dict[ir.Value, list[Product]] = {}
    for product in _products(graph):
        groups.setdefault(product.weight, []).append(product)
    return [
        products
        for weight, products in groups.items()
        if len({(product.transposed, product.scale) for product in products}) == 1
        and _readers(weight) == {product.node for product in products}
    ]


def _readers(weight: ir.Value) -> set[ir.Node]:
    """What reads a weight, as it stands or transposed."""
    readers: set[ir.Node] = set()
    for node in weight.consumers():
        readers.update(node.outputs[0].consumers() if _turns(node) else [node])
    return readers


def _weight_behind(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """A float32 weight of two axes, and whether a ``Transpose`` stands between."""
    if value is None:
        return None
    producer = value.producer()
    source = producer.inputs[0] if producer is not None and _turns(producer) else value
    if source is None or not _is_weight(source) or len(_shape(source)) != 2:
        return None
    return source, source is not value


def _turns(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]


def _looks_up_rows(node: ir.Node) -> bool:
    if node.op_type != "Gather" or node.domain != "" or node.attributes.get_int("axis", 0) != 0:
        return False
    table = node.inputs[0]
    return table is not None and _is_weight(table) and len(_shape(table)) == 2


def _same(product: Product, table: ir.Value) -> bool:
    return product.shape == _shape(table) and np.array_equal(product.matrix(), _array(table))


def _is_weight(value: ir.Value) -> bool:
    tensor = value.const_value
    return value.is_initializer() and tensor is not None and tensor.dtype == ir.DataType.FLOAT


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(int(size) for size in value.const_value.shape.numpy())


def _size(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.size


def _array(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _row_bytes(width: int, bits: int, block: int) -> int:
    """Bytes of one row in blocks, its steps included.

    >>> _row_bytes(100, 4, 32)
    80
    """
    return -(-width // block) * (block * bits // 8 + 4)


def _store(
    model: ir.Model, weight: ir.Value, bits: int, block: int, transposed: bool = False, three_axes: bool = True
) -> tuple[ir.Value, ir.Value]:
    """New initialisers: the numbers, outputs × blocks × bytes or, without ``three_axes``, outputs × bytes; the steps,
    outputs × blocks."""
    array = _array(weight)
    packed, steps = quantized(array.T if transposed else array, bits, block)
    name = str(weight.name)
    stored = _register(model, f"{name}_Q{bits}", packed if three_axes else packed.reshape(len(packed), -1))
    return stored, _register(model, f"{name}_scales", steps)


def quantized(weight: NDArray[np.float32], bits: int, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """``weight`` (outputs×inputs) in blocks: numbers (outputs × blocks × bytes; of two 4-bit numbers in a byte the
    first is the lower half) and steps (outputs × blocks). The last block is filled up with zeros."""
    outputs, inputs = weight.shape
    blocks, half = -(-inputs // block), 2 ** (bits - 1)
    packed = np.empty((outputs, blocks, block * bits // 8), np.uint8)
    steps = np.empty((outputs, blocks), np.float32)
    for start in range(0, outputs, _ROWS):
        rows = slice(start, start + _ROWS)
        values = np.pad(weight[rows], ((0, 0), (0, blocks * block - inputs))).reshape(-1, blocks, block)
        low, high = values.min(2), values.max(2)
        step = np.where(np.abs(high) > np.abs(low), high, low) / np.float32(-half)
        inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step != 0)
        numbers = np.floor(values * inverse[..., None] + np.float32(half) + np.float32(0.5))
        whole = np.clip(numbers, 0, 2 * half - 1).astype(np.uint8)
        packed[rows] = whole if bits == 8 else whole[..., 0::2] | whole[..., 1::2] << 4
        steps[rows] = step
    return packed, steps


def _look_up(model: ir.Model, node: ir.Node, packed: ir.Value, steps: ir.Value, form: tuple[int, int, int]) -> None:
    width, bits, block = form
    ids = ir.node("Gather", [_row_numbers(model, _shape(packed)[0]), node.inputs[1]])
    attributes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    rows = ir.node("GatherBlockQuantized", [packed, ids.outputs[0], steps], attributes, domain=MICROSOFT)
    new = [ids, rows]
    if width % block:  # what fills up the last block
        ends = [_constant(model, number) for number in (0, width, -1)]
        new.append(ir.node("Slice", [rows.outputs[0], *ends]))
    model.opset_imports.setdefault(MICROSOFT, 1)
    _replace(node, new)


def _row_numbers(model: ir.Model, rows: int) -> ir.Value:
    """0 … rows − 1, int32."""
    name = f"rows_{rows}"
    for node in model.graph:
        if node.op_type == "Range" and node.name == name:
            return node.outputs[0]
    ends = [_constant(model, number, scalar=True) for number in (0, rows, 1)]
    node = ir.node("Range", ends, name=name)
    node.outputs[0].name = name
    model.graph.insert_before(model.graph[0], node)
    return node.outputs[0]


def _multiply(model: ir.Model, product: Product, packed: ir.Value, steps: ir.Value, form: tuple[int, int]) -> None:
    outputs, inputs = product.shape
    bits, block = form
    if product.scale != 1:
        steps = _register(model, f"{steps.name}_{product.scale}", _array(steps) * np.float32(product.scale))
    sizes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": _ACCURACY_LEVEL}
    bias = [] if product.bias is None else [None, None, product.bias]
    node = ir.node("MatMulNBits", [product.node.inputs[0], packed, steps, *bias], sizes, domain=MICROSOFT)
    model.opset_imports.setdefault(MICROSOFT, 1)
    _replace(product.node, [node])


def _register(model: ir.Model, name: str, array: NDArray[np.generic]) -> ir.Value:
    """A new initialiser; a name that is taken gets a number."""
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    free = next(name for name in names if name not in model.graph.initializers)
    tensor = ir.tensor(array, name=free)
    value = ir.Value(name=free, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _constant(model: ir.Model, number: int, *, scalar: bool = False) -> ir.Value:
    """An int64 of one axis or an int32 of none, each number once."""
    name = f"{'number' if scalar else 'numbers'}_{number}"
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    return _register(model, name, np.array(number, np.int32) if scalar else np.array([number], np.int64))


def _replace(node: ir.Node, new: list[ir.Node]) -> None:
    """Put nodes in the place of one; the last one's output takes over."""
    assert node.graph is not None
    old, taker = node.outputs[0], new[-1].outputs[0]
    taker.shape, taker.type, taker.name = old.shape, old.type, old.name
    if node.name:
        for added in new:
            added.name = f"{node.name}_{added.op_type}"
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, [old], [taker])
