"""Store weights of a graph in blocks of integers: embedding tables, output layers tied to them, and products.

A block is a run of inputs of one output, or a run of entries in one row of a table. It is stored as unsigned integers q
of 4 or 8 bits and a float32 step, and represents ``(q − 2^(bits−1)) · step``. The largest entry of a block sets the
step and becomes the most negative integer, since there is one more negative integer than there are positive ones. All
others are rounded to the nearest, halves upwards. ONNX Runtime's own quantiser rounds like this, and
`prehab_export.linalg` fits factors to it.

Products become ``MatMulNBits``, look-ups ``GatherBlockQuantized``. Both read the same bytes in the same order, one as
outputs × blocks × bytes, the other as rows × bytes. So a table and an output layer tied to it share one initialiser of
two axes and one of steps. A ``Reshape``, which a session folds when it opens, gives the product its third axis.

For ids beyond the table, ONNX Runtime's kernel returns other rows or zeros, where ``Gather`` would refuse them. So ids
first go through a ``Gather`` on the row numbers from 0 to the last, which refuses them again, and which still counts
negative ids from the end. The row numbers come from a ``Range`` that is folded, too, so all this costs is a look-up of
one integer per token.
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
# Bits → block sizes for rows of a table. With 8 bits, more entries per step cost little accuracy.
_TABLE_BLOCKS = {4: (BLOCK, 16), 8: (128, 64, BLOCK, 16)}
# Allows the kernels to multiply in int8, which makes them fast.
_ACCURACY_LEVEL = 4
# How many rows of a weight are rounded at a time.
_ROWS = 4096


@dataclass(frozen=True)
class Product:
    """``scale · x Wᵀ + bias`` with a weight W (outputs×inputs), which the graph stores as W or (``transposed``) Wᵀ."""

    node: ir.Node
    weight: ir.Value
    transposed: bool
    scale: float = 1.0
    bias: ir.Value | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        first, second = _shape(self.weight)
        return (second, first) if self.transposed else (first, second)

    def matrix(self) -> NDArray[np.float32]:
        """Return W, without the scale."""
        stored = _array(self.weight)
        return stored.T if self.transposed else stored


def product_of(node: ir.Node) -> Product | None:
    """Interpret a node as a product with a float32 weight of two axes on its right; None if it is not one."""
    if len(node.inputs) < 2 or (source := _weight_behind(node.inputs[1])) is None:
        return None
    weight, has_transpose = source
    get_int, get_float = node.attributes.get_int, node.attributes.get_float
    if node.op_type == "MatMul" and node.domain == "":
        return Product(node, weight, not has_transpose)
    by_rows = bool(get_int("transB", 0)) != has_transpose
    if node.op_type == "FusedMatMul":
        if any(get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")):
            return None
        return Product(node, weight, not by_rows, get_float("alpha", 1.0))
    if node.op_type == "Gemm" and not get_int("transA", 0):
        product = Product(node, weight, not by_rows, get_float("alpha", 1.0))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None:
            return product
        if get_float("beta", 1.0) == 1 and _is_weight(bias) and _shape(bias) == product.shape[:1]:
            return Product(node, weight, not by_rows, product.scale, bias)
    return None


def tables_in_blocks(model: ir.Model, bits: int) -> None:
    """Store embedding tables, and output layers with the same numbers, in blocks of 4 or 8 bits; in place.

    A table does not change if it is small, if blocks would not be smaller, or if another operator reads it, too.
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
        # The exporter may have stored a transposed copy of a small table for the output layer.
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
    """Store the weights of products in blocks of ``BLOCK`` inputs, if that is smaller; in place."""
    for products in _by_weight(model.graph):
        inputs = products[0].shape[1]
        if _row_bytes(inputs, bits, BLOCK) >= 4 * inputs:
            continue
        packed, steps = _store(model, products[0].weight, bits, BLOCK, products[0].transposed)
        for product in products:
            _multiply(model, product, packed, steps, (bits, BLOCK))
    RemoveUnusedNodesPass()(model)


def plain_products(model: ir.Model) -> None:
    """Rewrite every product with a weight as a ``MatMul`` and an ``Add`` of its bias, in place: ONNX Runtime's dynamic
    quantiser supports no other operator."""
    for products in _by_weight(model.graph):
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
    candidates = (product_of(node) for node in graph.all_nodes())
    return [product for product in candidates if product is not None]


def _by_weight(graph: ir.Graph) -> list[list[Product]]:
    """Products grouped by their weight, for weights that are only read by products of one form: any other reader would
    need the float32 weight beside the quantised one."""
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
    """The nodes that read a weight, directly or transposed."""
    readers: set[ir.Node] = set()
    for node in weight.consumers():
        readers.update(node.outputs[0].consumers() if _is_transpose(node) else [node])
    return readers


def _weight_behind(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """The float32 weight of two axes that a value is, and whether it passes through a ``Transpose``; else None."""
    if value is None:
        return None
    producer = value.producer()
    source = producer.inputs[0] if producer is not None and _is_transpose(producer) else value
    if source is None or not _is_weight(source) or len(_shape(source)) != 2:
        return None
    return source, source is not value


def _is_transpose(node: ir.Node) -> bool:
    """Whether a node is a transpose of a matrix."""
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]


def _looks_up_rows(node: ir.Node) -> bool:
    """Whether a node looks up rows of an embedding table."""
    if node.op_type != "Gather" or node.domain != "" or node.attributes.get_int("axis", 0) != 0:
        return False
    table = node.inputs[0]
    return table is not None and _is_weight(table) and len(_shape(table)) == 2


def _same(product: Product, table: ir.Value) -> bool:
    """Whether a product's weight holds the same numbers as a table."""
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
    """The number of bytes of one row in blocks, including its steps.

    >>> _row_bytes(100, 4, 32)
    80
    """
    return -(-width // block) * (block * bits // 8 + 4)


def _store(
    model: ir.Model, weight: ir.Value, bits: int, block: int, transposed: bool = False, three_axes: bool = True
) -> tuple[ir.Value, ir.Value]:
    """Add a weight in blocks to the graph.

    Returns:
        Two initialisers: the integers, outputs × blocks × bytes (without ``three_axes``, outputs × bytes); and the
        steps, outputs × blocks.
    """
    array = _array(weight)
    packed, steps = quantized(array.T if transposed else array, bits, block)
    name = str(weight.name)
    stored = _register(model, f"{name}_Q{bits}", packed if three_axes else packed.reshape(len(packed), -1))
    return stored, _register(model, f"{name}_scales", steps)


def quantized(weight: NDArray[np.float32], bits: int, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantise ``weight`` (outputs×inputs) in blocks; the last block of a row is padded with zeros.

    Returns:
        The integers, outputs × blocks × bytes (with 4 bits, the lower half of a byte is the first integer); and the
        steps, outputs × blocks.
    """
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
        integers = np.clip(numbers, 0, 2 * half - 1).astype(np.uint8)
        packed[rows] = integers if bits == 8 else integers[..., 0::2] | integers[..., 1::2] << 4
        steps[rows] = step
    return packed, steps


def _look_up(model: ir.Model, node: ir.Node, packed: ir.Value, steps: ir.Value, form: tuple[int, int, int]) -> None:
    """Replace a look-up by one in a table in blocks; ``form`` is the table's width, its bits and its block size."""
    width, bits, block = form
    ids = ir.node("Gather", [_row_numbers(model, _shape(packed)[0]), node.inputs[1]])
    attributes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    rows = ir.node("GatherBlockQuantized", [packed, ids.outputs[0], steps], attributes, domain=MICROSOFT)
    new = [ids, rows]
    if width % block:  # cut off the padding of the last block
        bounds = [_constant(model, number) for number in (0, width, -1)]
        new.append(ir.node("Slice", [rows.outputs[0], *bounds]))
    model.opset_imports.setdefault(MICROSOFT, 1)
    _replace(node, new)


def _row_numbers(model: ir.Model, rows: int) -> ir.Value:
    """The numbers 0 … rows − 1, int32; made once per graph."""
    name = f"rows_{rows}"
    for node in model.graph:
        if node.op_type == "Range" and node.name == name:
            return node.outputs[0]
    bounds = [_constant(model, number, scalar=True) for number in (0, rows, 1)]
    node = ir.node("Range", bounds, name=name)
    node.outputs[0].name = name
    model.graph.insert_before(model.graph[0], node)
    return node.outputs[0]


def _multiply(model: ir.Model, product: Product, packed: ir.Value, steps: ir.Value, form: tuple[int, int]) -> None:
    """Replace a product by one with a weight in blocks; ``form`` is the weight's bits and block size."""
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
    """Add an initialiser to the graph; a number is added to a name that is already used."""
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    free_name = next(name for name in names if name not in model.graph.initializers)
    tensor = ir.tensor(array, name=free_name)
    value = ir.Value(name=free_name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _constant(model: ir.Model, number: int, *, scalar: bool = False) -> ir.Value:
    """A constant, int64 with one axis or (``scalar``) int32 without; each number is made once per graph."""
    name = f"{'number' if scalar else 'numbers'}_{number}"
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    return _register(model, name, np.array(number, np.int32) if scalar else np.array([number], np.int64))


def _replace(node: ir.Node, new: list[ir.Node]) -> None:
    """Replace a node by several; the output of the last replaces that of ``node``."""
    assert node.graph is not None
    old_output, new_output = node.outputs[0], new[-1].outputs[0]
    new_output.shape, new_output.type, new_output.name = old_output.shape, old_output.type, old_output.name
    if node.name:
        for new_node in new:
            new_node.name = f"{node.name}_{new_node.op_type}"
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, [old_output], [new_output])
