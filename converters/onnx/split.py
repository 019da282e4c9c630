"""Undo fusions that cost time on ONNX Runtime's CPU.

Norms with a residual sum are scalar code there, while those without are vectorised: for 384×768 numbers, the fused
operator took 1.2 ms on one core, and the separate sum and norm took 0.16 ms. ``BiasGelu`` takes a tenth longer than its
parts, and a quantised product adds its bias at no cost. ``benchmarks/norms.py`` measures this. Residuals are added by
``Sum``, because a session's own optimiser does not turn that into the slow operator again.
"""

import onnx_ir as ir

MICROSOFT = "com.microsoft"
# Fused operator → the operator without the additions, and how many scales that takes after its input.
_NORMS = {
    "SkipLayerNormalization": ("LayerNormalization", 2),
    "SkipSimplifiedLayerNormalization": ("RMSNormalization", 1),
}


def split_slow_fusions(graph: ir.Graph) -> None:
    """Separate residual sums and biases from norms and activations, in place."""
    for node in list(graph.all_nodes()):
        if node.domain != MICROSOFT:
            continue
        if node.op_type in _NORMS:
            _split_norm(graph, node)
        elif node.op_type == "BiasGelu":
            total = ir.node("Add", node.inputs)
            _replace(graph, node, [total, ir.node("Gelu", total.outputs)], {0: 1})


def _split_norm(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a norm with a residual sum by the additions and a plain norm."""
    kind, scales = _NORMS[node.op_type]
    states, residual, *rest = node.inputs
    biased = [ir.node("Add", [states, bias]) for bias in rest[scales:] if bias is not None]
    total = ir.node("Sum", [biased[0].outputs[0] if biased else states, residual])
    norm = ir.node(kind, [total.outputs[0], *rest[:scales]], {"epsilon": node.attributes.get_float("epsilon")})
    _replace(graph, node, [*biased, total, norm], {0: -1, 3: -2})


def _replace(graph: ir.Graph, node: ir.Node, new: list[ir.Node], outputs: dict[int, int]) -> None:
    """Replace a node by several. ``outputs`` maps the index of each output of ``node`` to the index of the new node
    whose only output replaces it."""
    pairs = [(value, new[outputs[index]].outputs[0]) for index, value in enumerate(node.outputs) if index in outputs]
    for old_value, new_value in pairs:
        new_value.shape, new_value.type = old_value.shape, old_value.type
        new_value.name = old_value.name
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], new, [old_value for old_value, _ in pairs], [new_value for _, new_value in pairs]
    )
