"""Graph fusion for ONNX Runtime on CPU, with onnxscript's rules.

The order is what makes the counts dependable. onnxscript's ONNX Runtime rules must see the norms as the model wrote
them (``SkipSimplifiedLayerNormalization`` takes the residual sum too), the opset-23 rules then find the rotary
embeddings, which the first set recognises but cannot place: its rule for the cosine table expects a matrix product
where transformers now multiplies elementwise. Everything that finds no match stays as it was.
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
    """Fold constants, drop what nothing reads, compute once what is computed twice (``down(x)`` of layers that share
    their ``down``); standard operators only. In place."""
    optimize(model)
    CommonSubexpressionEliminationPass()(model)


def fuse_graph(model: ir.Model) -> None:
    """Fuse norms, activations and rotary embeddings, in place; residual sums stay out of the norms (see ``split``)."""
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
    """Fused operators in the graph, by operator: what a runtime will meet, not what a rule claims to have done."""
    counts = Counter(node.op_type for node in model.graph.all_nodes() if node.op_type in FUSED_OPERATORS)
    return dict(sorted(counts.items()))


def _standardise_rms_norms(graph: ir.Graph) -> None:
    # onnxscript leaves ONNX Runtime's old operator, which the ONNX checker does not know, where a norm has no
    # residual sum; since opset 23 it has a standard name, the same inputs and the same attributes.
    for node in graph.all_nodes():
        if node.op_type == "SimplifiedLayerNormalization" and len(node.outputs) == 1:
            node.op_type = "RMSNormalization"


def _widen_rotary_tables(graph: ir.Graph) -> None:
    # The operator wants a row of cosines and sines per sequence of the batch. Where no position_ids come in, the
    # model computes one row for all, and the rule that placed the operator does not look.
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
    """The first dimension; a rewritten cosine or sine has no shape yet and takes that of its angles."""
    producer = value.producer()
    source = producer.inputs[0] if value.shape is None and producer is not None else value
    if source is None or source.shape is None:
        return None
    first = source.shape[0]
    return first if isinstance(first, int) else first.value


def _hide_attention(model: ir.Model) -> None:
    # ONNX's Attention has a namesake among ONNX Runtime's own operators, and onnxruntime.quantization goes by the
    # name alone: it would quantise queries and keys as if they were input and weight, and write an invalid graph.
    # A function of the model under another name is inlined when a session opens.
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
