"""Find what a graph computes with many operators although one would do: attention, norms, activations, rotary
embeddings.

A fusion rule that finds no match says nothing; the graph is then correct but slow. So the finished graph is searched
for the form that each of them has when it is not fused. The names of a model's modules say less: a norm may be a
function, and a model may have no attention at all, or one that another rule has fused.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from converters.onnx.attention import ONNX_ATTENTION, onnx_attention

ATTENTION, NORM, ACTIVATION, ROTARY = "attention", "norm", "GELU", "rotary embedding"

# The operators that each of them may become in a fused graph.
OPERATORS = {
    ATTENTION: {"Attention", "GroupQueryAttention", "MultiHeadAttention", "ScaledDotProductAttention"},
    NORM: {"LayerNormalization", "RMSNormalization"},
    ACTIVATION: {"Gelu", "FastGelu", "QuickGelu"},
    ROTARY: {"RotaryEmbedding"},
}

_PRODUCTS = {"Einsum", "FusedMatMul", "MatMul"}
# Operators that may be between the scores of an attention, its softmax, and the product with the values.
_CARRY = {
    "Add", "Cast", "Clip", "Concat", "Div", "Dropout", "Expand", "Identity", "Max", "Mul", "Reshape", "Slice",
    "Squeeze", "Sub", "Sum", "Tanh", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[Counter[str]]:
    """Count the norms, activations and attentions (by ONNX's operator) that the model computes within the block."""
    counts: Counter[str] = Counter()

    def count(kind: str) -> Callable[..., None]:
        return lambda *_: counts.update([kind])

    def attend(*args: Any, **options: Any) -> tuple[Tensor, None]:
        counts.update([ATTENTION])
        return onnx_attention(*args, **options)

    modules = ((_kind(module), module) for module in model.modules())
    handles = [module.register_forward_hook(count(kind)) for kind, module in modules if kind is not None]
    AttentionInterface.register(ONNX_ATTENTION, attend)
    try:
        yield counts
    finally:
        AttentionInterface.register(ONNX_ATTENTION, onnx_attention)
        for handle in handles:
            handle.remove()


def _kind(module: nn.Module) -> str | None:
    """Whether a module is a norm or an activation, by its class."""
    name = type(module).__name__
    if isinstance(module, nn.LayerNorm) or name.endswith(("RMSNorm", "LayerNorm")):
        return NORM
    return ACTIVATION if "GELU" in name else None


def spelled_out(graph: ir.Graph) -> Counter[str]:
    """Count what the finished graph has in the form of plain operators, by kind."""
    counts: Counter[str] = Counter()
    for node in graph.all_nodes():
        for kind, is_plain in _PLAIN_FORMS.items():
            counts[kind] += is_plain(node)
    return +counts


def _is_plain_attention(node: ir.Node) -> bool:
    """Whether the node is a softmax over products of activations, and multiplied with activations afterwards."""
    if node.op_type != "Softmax":
        return False
    return any(_multiplies_activations(before) for before in _neighbours(node, back=True)) and any(
        _multiplies_activations(after) for after in _neighbours(node, back=False)
    )


def _is_plain_norm(node: ir.Node) -> bool:
    """Whether the node is the root of a mean of squares, to which a small number may be added."""
    if node.op_type not in ("Sqrt", "Rsqrt") and not _raises_to(node, -0.5) and not _raises_to(node, 0.5):
        return False
    source = _producer(node.inputs[0])
    parts = source.inputs if source is not None and source.op_type in ("Add", "Max", "Clip") else node.inputs[:1]
    producers = [_producer(part) for part in parts]
    return any(producer is not None and producer.op_type == "ReduceMean" for producer in producers)


def _is_plain_gelu(node: ir.Node) -> bool:
    """Whether the node is an ``Erf``, or 1 + tanh(…) of a sum that includes a cube, or a sigmoid of 1.702 x."""
    if node.op_type == "Erf":
        return True
    if node.op_type == "Sigmoid":
        scaled = _producer(node.inputs[0])
        return scaled is not None and scaled.op_type == "Mul" and any(_is_near(v, 1.702) for v in scaled.inputs)
    if node.op_type != "Tanh" or not any(
        after.op_type == "Add" and any(_is_near(value, 1.0) for value in after.inputs)
        for after in node.outputs[0].consumers()
    ):
        return False
    scaled = _producer(node.inputs[0])
    return scaled is not None and scaled.op_type in ("Mul", "Add")


def _is_plain_rotary(node: ir.Node) -> bool:
    """Whether the node joins the halves of a tensor, or its even and odd entries, swapped and with one part negated."""
    if node.op_type != "Concat" or len(node.inputs) != 2:
        return False
    negation, second = (_producer(value, "Unsqueeze") for value in node.inputs)
    if negation is None or negation.op_type != "Neg":
        return False
    first = _producer(negation.inputs[0])
    if first is None or second is None or first.op_type != second.op_type or second.op_type not in ("Slice", "Split"):
        return False
    return first.inputs[0] is second.inputs[0]


_PLAIN_FORMS = {
    ATTENTION: _is_plain_attention,
    NORM: _is_plain_norm,
    ACTIVATION: _is_plain_gelu,
    ROTARY: _is_plain_rotary,
}


def _neighbours(node: ir.Node, *, back: bool) -> Iterator[ir.Node]:
    """The first nodes before (``back``) or after this one that do more than pass its values on."""
    visited, queue = {node}, [node]
    while queue:
        current = queue.pop()
        if back:
            adjacent = [producer for value in current.inputs if (producer := _producer(value)) is not None]
        else:
            adjacent = [reader for value in current.outputs for reader in value.consumers()]
        for other in adjacent:
            if other not in visited:
                visited.add(other)
                if other.op_type in _CARRY:
                    queue.append(other)
                else:
                    yield other


def _multiplies_activations(node: ir.Node) -> bool:
    """Whether the node is a product of two activations."""
    return node.op_type in _PRODUCTS and not any(value is None or _is_constant(value) for value in node.inputs[:2])


def _is_constant(value: ir.Value) -> bool:
    """Whether a value is a weight, or a weight that was cast, reshaped or transposed."""
    while (node := value.producer()) is not None and node.op_type in ("Cast", "Identity", "Reshape", "Transpose"):
        source = node.inputs[0]
        if source is None:
            return False
        value = source
    return value.is_initializer() or (node is not None and node.op_type == "Constant")


def _producer(value: ir.Value | None, *skipped: str) -> ir.Node | None:
    """The node that computes a value, before any casts and operators of the kinds ``skipped``."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Cast", "Identity", *skipped):
        source = node.inputs[0]
        node = None if source is None else source.producer()
    return node


def _raises_to(node: ir.Node, exponent: float) -> bool:
    return node.op_type == "Pow" and _is_near(node.inputs[1], exponent)


def _is_near(value: ir.Value | None, number: float) -> bool:
    """Whether a value is a constant close to a number."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size == 1 and abs(float(tensor.numpy().reshape(-1)[0]) - number) < 1e-2


def missing(expected: Mapping[str, int], fusions: Mapping[str, int]) -> list[str]:
    """Write a sentence for each kind of operator that is missing in the graph.

    >>> missing({"norm": 3}, {"LayerNormalization": 2})
    ['1 of 3 norms is not one operator in the graph, which makes it slower']
    """
    sentences = []
    for kind, count in expected.items():
        shortfall = count - sum(fusions.get(operator, 0) for operator in OPERATORS[kind])
        if shortfall > 0:
            verb = "is not one operator" if shortfall == 1 else "are not one operator each"
            sentences.append(f"{shortfall} of {count} {kind}s {verb} in the graph, which makes it slower")
    return sentences
