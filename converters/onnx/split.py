"""Fusions that cost time on ONNX Runtime's CPU, taken apart again.

Its norms with a residual sum are scalar code where those without are vectorised: 384×768 numbers took 1.2 ms on one
core against 0.16 ms for the sum and the norm on their own. ``BiasGelu`` takes a tenth longer than its parts, and a
quantised product adds its bias for nothing. ``benchmarks/norms.py`` measures it. Residuals are added by ``Sum``, of
which a session's own optimiser does not make the slow operator again.
"""

import onnx_ir as ir

MICROSOFT = "com.microsoft"
# Fused operator → what is left without the additions, and how many scales that takes after its input.
_NORMS = {
    "SkipLayerNormalization": ("LayerNormalization", 2),
    "SkipSimplifiedLayerNormalization": ("RMSNormalization", 1),
}


def split_slow_fusions(graph: ir.Graph) -> None:
    """Take residual sums and biases out of norms and activations, in place."""
    for node in list(graph.all_nodes()):
        if node.domain != MICROSOFT:
            continue
        if node.op_type in _NORMS:
            _split_norm(graph, node)
        elif node.op_type == "BiasGelu":
            total = ir.node("Add", node.inputs)
            _replace(graph, node, [total, ir.node("Gelu", total.outputs)], {0: 1})


def _split_norm(graph: ir.Graph, node: ir.Node) -> None:
    kind, scales = _NORMS[node.op_type]
    states, residual, *rest = node.inputs
    biased = [ir.node("Add", [states, bias]) for bias in rest[scales:] if bias is not None]
    total = ir.node("Sum", [biased[0].outputs[0] if biased else states, residual])
    norm = ir.node(kind, [total.outputs[0], *rest[:scales]], {"epsilon": node.attributes.get_float("epsilon")})
    _replace(graph, node, [*biased, total, norm], {0: -1, 3: -2})


def _replace(graph: ir.Graph, node: ir.Node, new: list[ir.Node], outputs: dict[int, int]) -> None:
    """Put nodes in the place of one; ``outputs``: its output → the new node whose only output takes over."""
    old = [(value, new[outputs[index]].outputs[0]) for index, value in enumerate(node.outputs) if index in outputs]
    for value, taker in old:
        taker.shape, taker.type = value.shape, value.type
        taker.name = value.name
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], new, [value for value, _ in old], [taker for _, taker in old]
    )
