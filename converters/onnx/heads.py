"""Let attention split its inputs into heads itself, to save transposes.

A model splits queries, keys and values into heads, swaps the axes of heads and tokens, attends, and swaps them back:
four transposes of everything. ONNX's ``Attention`` also takes the tensors as the linear layers return them, with heads
side by side, and reads them in strides. This saves a seventh to a third of the time
(``benchmarks/encoder_operators.py``). Keys that are rotated or come from a cache already have separate heads; such an
attention does not change.
"""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

_SWAPPED = (0, 2, 1, 3)


def keep_heads_together(model: ir.Model) -> int:
    """Rewrite every attention that allows it, in place; returns the number of rewritten ones."""
    count = sum(_rewrite(model.graph, node) for node in list(model.graph) if _is_attention(node))
    if count:
        RemoveUnusedNodesPass()(model)
    return count


def _is_attention(node: ir.Node) -> bool:
    return node.op_type == "Attention" and node.domain == "" and len(node.inputs) <= 4 and len(node.outputs) == 1


def _rewrite(graph: ir.Graph, node: ir.Node) -> bool:
    """Rewrite one attention, in place; returns whether it was possible."""
    states = [_before_split(value) for value in node.inputs[:3]]
    output = _after_join(node.outputs[0])
    heads = [_axis(value, 1) for value in node.inputs[:2]]
    if output is None or any(part is None for part in (*states, *heads)):
        return False
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes |= {"q_num_heads": heads[0], "kv_num_heads": heads[1]}
    new = ir.node("Attention", [*states, *node.inputs[3:]], attributes)
    new_output = new.outputs[0]
    new_output.shape, new_output.type, new_output.name = output.shape, output.type, output.name
    graph.insert_before(node, new)
    output.replace_all_uses_with(new_output, replace_graph_outputs=True)
    return True


def _before_split(value: ir.Value | None) -> ir.Value | None:
    """The tensor (B, T, H·d) that was split into ``value`` (B, H, T, d), if nothing else was done to it."""
    transpose = _producer(value, "Transpose")
    reshape = None if transpose is None or not _swaps(transpose) else _producer(transpose.inputs[0], "Reshape")
    return None if reshape is None else _side_by_side(reshape.inputs[0], value)


def _after_join(value: ir.Value) -> ir.Value | None:
    """The tensor (B, T, H·d) that ``value`` (B, H, T, d) is joined to, if nothing else is done with it."""
    transpose = _only_reader(value, "Transpose")
    reshape = None if transpose is None or not _swaps(transpose) else _only_reader(transpose.outputs[0], "Reshape")
    return None if reshape is None else _side_by_side(reshape.outputs[0], value)


def _side_by_side(value: ir.Value | None, split: ir.Value | None) -> ir.Value | None:
    """``value`` if it is (B, T, H·d) where ``split`` is (B, H, T, d); else None."""
    heads, width = _axis(split, 1), _axis(split, 3)
    if value is None or value.shape is None or len(value.shape) != 3 or heads is None or width is None:
        return None
    return value if _axis(value, 2) == heads * width else None


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node that computes a value, if it is of this kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _only_reader(value: ir.Value, kind: str) -> ir.Node | None:
    """The node that reads a value, if it is the only one and of this kind."""
    nodes = [use.node for use in value.uses()]
    return nodes[0] if len(nodes) == 1 and nodes[0].op_type == kind and not value.is_graph_output() else None


def _swaps(node: ir.Node) -> bool:
    """Whether a transpose swaps the axes of heads and tokens."""
    return tuple(node.attributes.get_ints("perm", ())) == _SWAPPED


def _axis(value: ir.Value | None, index: int) -> int | None:
    """The size of an axis, if it is known."""
    size = None if value is None or value.shape is None else value.shape[index]
    return size if isinstance(size, int) else None
