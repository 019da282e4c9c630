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

FUSED_OPERATORS = frozenset(
    {
        "Attention",
        "BiasGelu",
        "FastGelu",
        "FusedMatMul",
        "Gelu",
        "GroupQueryAttention",
        "MultiHeadAttention",
        "RMSNormalization",
        "RotaryEmbedding",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)


def simplify(model: ir.Model) -> None:
    """Fold constants and drop what nothing reads; standard operators only. In place."""
    optimize(model)
    CommonSubexpressionEliminationPass()(model)


def fuse(model: ir.Model) -> None:
    """Fuse norms, residual sums, activations and rotary embeddings, in place."""
    optimize(model)
    optimize_for_ort(model, config_name="cpu")
    onnx_fusions.fuse(model)
    _standardise_rms_norms(model)
    simplify(model)


def count_fusions(model: ir.Model) -> dict[str, int]:
    """Fused operators in the graph, by operator: what a runtime will meet, not what a rule claims to have done."""
    counts = Counter(node.op_type for node in model.graph.all_nodes() if node.op_type in FUSED_OPERATORS)
    return dict(sorted(counts.items()))


def _standardise_rms_norms(model: ir.Model) -> None:
    # onnxscript leaves ONNX Runtime's old operator, which the ONNX checker does not know, where a norm has no
    # residual sum; since opset 23 it has a standard name, the same inputs and the same attributes.
    for node in model.graph.all_nodes():
        if node.op_type == "SimplifiedLayerNormalization" and len(node.outputs) == 1:
            node.op_type = "RMSNormalization"
