"""Attention that finds its heads by itself.

A model splits queries, keys and values into heads, turns heads and tokens round, attends, and turns the answer back:
four transposes of everything. ONNX's ``Attention`` takes the tensors as the linear layers give them, heads side by
side, and walks over them in strides, which saves a seventh to a third of the time
(``benchmarks/encoder_operators.py``). Where keys are rotated or come from a cache, they have their heads apart already,
and stay as they are.
"""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

_SWAPPED = (0, 2, 1, 3)


def keep_heads_together(model: ir.Model) -> int:
    """Rewrite every attention that allows it, in place; returns how many."""
    count = sum(_rewrite(model.graph, node) for node in list(model.graph) if _is_attention(node))
    if count:
        RemoveUnusedNodesPass()(model)
    return count


def _is_attention(node: ir.Node) -> bool:
    return node.op_type == "Attention" and node.domain == "" and len(node.inputs) <= 4 and len(node.outputs) == 1


def _rewrite(graph: ir.Graph, node: ir.Node) -> bool:
    states = [_whole(value) for value in node.inputs[:3]]
    answer = _joined(node.outputs[0])
    heads = [_axis(value, 1) for value in node.inputs[:2]]
    if answer is None or any(part is None for part in (*states, *heads)):
        return False
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes |= {"q_num_heads": heads[0], "kv_num_heads": heads[1]}
    new = ir.node("Attention", [*states, *node.inputs[3:]], attributes)
    taker = new.outputs[0]
    taker.shape, taker.type, taker.name = answer.shape, answer.type, answer.name
    graph.insert_before(node, new)
    answer.replace_all_uses_with(taker, replace_graph_outputs=True)
    return True


def _whole(value: ir.Value | None) -> ir.Value | None:
    """The tensor (B, T, H·d) that ``value`` (B, H, T, d) was made from, if that is all that was done to it."""
    turned = _producer(value, "Transpose")
    split = None if turned is None or not _swaps(turned) else _producer(turned.inputs[0], "Reshape")
    return None if split is None else _side_by_side(split.inputs[0], value)


def _joined(value: ir.Value) -> ir.Value | None:
    """What (B, T, H·d) is made of ``value`` (B, H, T, d), if that is all that is done with it."""
    turned = _only_reader(value, "Transpose")
    whole = None if turned is None or not _swaps(turned) else _only_reader(turned.outputs[0], "Reshape")
    return None if whole is None else _side_by_side(whole.outputs[0], value)


def _side_by_side(value: ir.Value | None, apart: ir.Value | None) -> ir.Value | None:
    """``value``, if it is (B, T, H·d) where ``apart`` is (B, H, T, d)."""
    heads, width = _axis(apart, 1), _axis(apart, 3)
    if value is None or value.shape is None or len(value.shape) != 3 or heads is None or width is None:
        return None
    return value if _axis(value, 2) == heads * width else None


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _only_reader(value: ir.Value, kind: str) -> ir.Node | None:
    nodes = [use.node for use in value.uses()]
    return nodes[0] if len(nodes) == 1 and nodes[0].op_type == kind and not value.is_graph_output() else None


def _swaps(node: ir.Node) -> bool:
    """Whether a transpose turns heads and tokens round."""
    return tuple(node.attributes.get_ints("perm", ())) == _SWAPPED


def _axis(value: ir.Value | None, index: int) -> int | None:
    """The size of an axis, where it is known."""
    size = None if value is None or value.shape is None else value.shape[index]
    return size if isinstance(size, int) else None
