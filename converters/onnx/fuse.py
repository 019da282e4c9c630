"""Fuse operators of a graph for ONNX Runtime on CPU, with onnxscript's rules.

The order makes the result reliable. onnxscript's ONNX Runtime rules come first, because they must see the norms as the
model wrote them (``SkipSimplifiedLayerNormalization`` also takes the residual sum). The opset-23 rules then find the
rotary embeddings. The first set recognises these but cannot replace them: its rule for the cosine table expects a
matrix product where transformers now multiplies elementwise. Whatever matches no rule does not change.
"""

from collections import Counter

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnxscript.optimizer import optimize
from onnxscript.rewriter import onnx_fusions
from onnxscript.rewriter.ort_fusions import optimize_for_ort

from converters.onnx.heads import keep_heads_together
from converters.onnx.split import split_slow_fusions

ATTENTION, ATTENTION_DOMAIN = "ScaledDotProductAttention", "converters"

FUSED_OPERATORS = frozenset(
    {
        "Attention",
        "FastGelu",
        "FusedMatMul",
        "Gelu",
        "GroupQueryAttention",
        "LayerNormalization",
        "MultiHeadAttention",
        "RMSNormalization",
        "RotaryEmbedding",
        ATTENTION,
    }
)


def simplify_graph(model: ir.Model) -> None:
    """Fold constants, remove unused nodes, and merge repeated computations (``down(x)`` of layers that share ``down``),
    in place; only standard operators are used."""
    optimize(model)
    CommonSubexpressionEliminationPass()(model)


def fuse_graph(model: ir.Model) -> None:
    """Fuse norms, activations and rotary embeddings, in place; residual sums stay separate from norms (see
    ``split``)."""
    optimize(model)
    optimize_for_ort(model, config_name="cpu")
    onnx_fusions.fuse(model)
    _standardise_rms_norms(model.graph)
    split_slow_fusions(model.graph)
    _widen_rotary_tables(model.graph)
    simplify_graph(model)
    keep_heads_together(model)
    _hide_attention(model)


def count_fusions(model: ir.Model) -> dict[str, int]:
    """Count the fused operators in the finished graph, by operator, whatever the rules report."""
    counts = Counter(node.op_type for node in model.graph.all_nodes() if node.op_type in FUSED_OPERATORS)
    return dict(sorted(counts.items()))


def _standardise_rms_norms(graph: ir.Graph) -> None:
    """Rename RMS norms to their standard operator, in place.

    For a norm without a residual sum, onnxscript uses ONNX Runtime's old operator, which the ONNX checker does not
    know. Since opset 23 there is a standard operator with the same inputs and attributes.
    """
    for node in graph.all_nodes():
        if node.op_type == "SimplifiedLayerNormalization" and len(node.outputs) == 1:
            node.op_type = "RMSNormalization"


def _widen_rotary_tables(graph: ir.Graph) -> None:
    """Expand the cosines and sines of rotary embeddings to the size of the batch, in place.

    The operator requires one row per sequence of the batch. Without position_ids, the model computes one row for all,
    and the rule that inserts the operator does not check this.
    """
    for node in list(graph.all_nodes()):
        if node.op_type != "RotaryEmbedding" or node.domain != "":
            continue
        states, cosine, sine = (value for value in node.inputs[:3] if value is not None)
        if _batch_of(cosine) == _batch_of(states) is not None:
            continue
        batch = ir.node("Shape", [states], {"start": 0, "end": 1})
        ones = ir.node("Constant", [], {"value_ints": [1, 1]})
        shape = ir.node("Concat", [batch.outputs[0], ones.outputs[0]], {"axis": 0})
        tables = [ir.node("Expand", [table, shape.outputs[0]]) for table in (cosine, sine)]
        graph.insert_before(node, [batch, ones, shape, *tables])
        for index, table in enumerate(tables, start=1):
            node.replace_input_with(index, table.outputs[0])


def _batch_of(value: ir.Value) -> int | str | None:
    """The first dimension; a rewritten cosine or sine has no shape yet, and that of its angles is used."""
    producer = value.producer()
    source = producer.inputs[0] if value.shape is None and producer is not None else value
    if source is None or source.shape is None:
        return None
    first = source.shape[0]
    return first if isinstance(first, int) else first.value


def _hide_attention(model: ir.Model) -> None:
    """Wrap every ``Attention`` in a function of another name, in place.

    ONNX Runtime has an operator of its own with the same name, and onnxruntime.quantization only looks at the name: it
    would quantise queries and keys as if they were input and weight, and write an invalid graph. The function is
    inlined when a session opens.
    """
    kinds = {"scale": ir.AttributeType.FLOAT, "q_num_heads": ir.AttributeType.INT, "kv_num_heads": ir.AttributeType.INT}
    inputs = [ir.val(name) for name in ("query", "key", "value", "mask")]
    body = ir.Node("", "Attention", inputs, [ir.RefAttr(name, name, kind) for name, kind in kinds.items()])
    calls = [node for node in model.graph.all_nodes() if node.op_type == "Attention" and node.domain == ""]
    for node in calls:
        node.op_type, node.domain = ATTENTION, ATTENTION_DOMAIN
    if calls:
        graph = ir.Graph(inputs, body.outputs, nodes=[body], opset_imports={"": model.opset_imports[""]})
        attributes = [ir.Attr(name, kind, None) for name, kind in kinds.items()]
        function = ir.Function(ATTENTION_DOMAIN, ATTENTION, graph=graph, attributes=attributes)
        model.functions[function.identifier()] = function
        model.opset_imports[ATTENTION_DOMAIN] = 1
