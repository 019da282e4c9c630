"""Combine several matrix products that read the same input into one.

In a factored attention, ``query.down``, ``key.down`` and ``value.down`` all read x, and so do the two ``down`` of gate
and up in an MLP. Side by side, their weights form one weight that is wide enough for the product to run closer to the
machine's peak. A ``Split`` then gives every reader its part. Each number is the same sum of the same terms as before.
Only products whose output is narrower than their input are stacked: wide products reach the peak on their own, and when
stacked they were slower in decoding token by token.
"""

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def stack_products(model: ir.Model) -> list[str]:
    """Stack the weights of products with the same input, in place, and their biases if every product has one. Returns
    the names of the new initialisers."""
    products: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        # An output of the graph keeps its own product, so that it keeps its name.
        if node.op_type == "MatMul" and _narrows(node.inputs[1]) and not node.outputs[0].is_graph_output():
            products.setdefault(_input(node, 0), []).append(node)
    stacks = [nodes for nodes in products.values() if len(nodes) > 1]
    names = [name for nodes in stacks for name in _stack(model.graph, nodes)]
    RemoveUnusedNodesPass()(model)
    return names


def _stack(graph: ir.Graph, products: Sequence[ir.Node]) -> list[str]:
    """Replace these products by one, and return the names of its initialisers."""
    weights = [_input(node, 1) for node in products]
    initialisers = [_joined(graph, weights, axis=1)]
    stacked = ir.node("MatMul", [products[0].inputs[0], initialisers[0]])
    new_nodes, replaced = [stacked], list(products)
    sums = [_bias_sum(node) for node in products]
    if all(total is not None for total in sums):
        replaced = [total for total in sums if total is not None]
        initialisers.append(_joined(graph, [_bias(total) for total in replaced], axis=0))
        new_nodes.append(ir.node("Add", [stacked.outputs[0], initialisers[1]]))
    widths = ir.tensor(np.array([_size(weight)[1] for weight in weights], np.int64))
    sizes = ir.node("Constant", [], {"value": widths})
    split = ir.node("Split", [new_nodes[-1].outputs[0], sizes.outputs[0]], {"axis": -1}, num_outputs=len(products))
    graph.insert_before(products[0], [*new_nodes, sizes, split])
    for node, part in zip(replaced, split.outputs, strict=True):
        node.outputs[0].replace_all_uses_with(part)
    return [str(value.name) for value in initialisers]


def _bias_sum(product: ir.Node) -> ir.Node | None:
    """The node that adds a bias to this product, if nothing else reads the product."""
    uses = product.outputs[0].uses()
    if len(uses) != 1:
        return None
    node = next(iter(uses)).node
    takes_bias = node.op_type == "Add" and any(_is_weight(value, rank=1) for value in node.inputs)
    return node if takes_bias and not node.outputs[0].is_graph_output() else None


def _bias(total: ir.Node) -> ir.Value:
    """The bias that this node adds."""
    return next(value for value in total.inputs if value is not None and _is_weight(value, rank=1))


def _narrows(value: ir.Value | None) -> bool:
    """Whether a value is a weight with fewer outputs than inputs."""
    if value is None or not _is_weight(value, rank=2):
        return False
    inputs, outputs = _size(value)
    return outputs < inputs


def _is_weight(value: ir.Value | None, rank: int) -> bool:
    """Whether a value is an initialiser with this number of axes that only one node reads."""
    if value is None or not value.is_initializer() or value.const_value is None or value.is_graph_output():
        return False
    return len(value.const_value.shape) == rank and len(value.uses()) == 1


def _joined(graph: ir.Graph, parts: Sequence[ir.Value], axis: int) -> ir.Value:
    """A new initialiser that joins these along an axis. It is only computed when it is written: the parts are views of
    the model's weights."""
    tensors = [part.const_value for part in parts]
    shape = _size(parts[0])
    shape[axis] = sum(_size(part)[axis] for part in parts)
    name = joined_name([str(part.name) for part in parts])
    first = tensors[0]
    assert first is not None

    def join() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors if tensor is not None], axis), name=name)

    lazy = ir.LazyTensor(join, first.dtype, ir.Shape(shape), name=name)
    value = ir.Value(name=name, shape=lazy.shape, type=ir.TensorType(first.dtype), const_value=lazy)
    graph.register_initializer(value)
    return value


def joined_name(names: Sequence[str]) -> str:
    """Join names into one: the parts that they have in common, with the different parts in braces.

    >>> joined_name(["layer.0.query.down.weight.T", "layer.0.key.down.weight.T"])
    'layer.0.{query,key}.down.weight.T'
    """
    split = [name.split(".") for name in names]
    start = _shared_length(split)
    end = _shared_length([parts[start:][::-1] for parts in split])
    middle = [".".join(parts[start : len(parts) - end]) for parts in split]
    return ".".join([*split[0][:start], "{" + ",".join(middle) + "}", *split[0][len(split[0]) - end :]])


def _shared_length(parts: Sequence[Sequence[str]]) -> int:
    """The length of the longest common beginning."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _size(value: ir.Value) -> list[int]:
    assert value.const_value is not None
    return list(value.const_value.shape.numpy())
