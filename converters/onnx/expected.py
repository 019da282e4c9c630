"""What a graph spells out that one operator could do: attentions, norms, activations, rotary embeddings.

A fusion that finds no match says nothing; the graph is right and slow. So the finished graph is searched for the form
that each takes when it is not fused. What a model's modules are called says less: a norm may be a function, a model may
have no attention at all, or one that another rule has fused.
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

# What each becomes in a fused graph; any of them will do.
OPERATORS = {
    ATTENTION: {"Attention", "GroupQueryAttention", "MultiHeadAttention", "ScaledDotProductAttention"},
    NORM: {"LayerNormalization", "RMSNormalization"},
    ACTIVATION: {"Gelu", "FastGelu", "QuickGelu"},
    ROTARY: {"RotaryEmbedding"},
}

_PRODUCTS = {"Einsum", "FusedMatMul", "MatMul"}
# What may stand between the scores of an attention, its softmax, and the product with the values.
_CARRY = {
    "Add", "Cast", "Clip", "Concat", "Div", "Dropout", "Expand", "Identity", "Max", "Mul", "Reshape", "Slice",
    "Squeeze", "Sub", "Sum", "Tanh", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[Counter[str]]:
    """The norms, activations and attentions (by ONNX's operator) that the model goes through within."""
    seen: Counter[str] = Counter()

    def count(kind: str) -> Callable[..., None]:
        return lambda *_: seen.update([kind])

    def attend(*args: Any, **options: Any) -> tuple[Tensor, None]:
        seen.update([ATTENTION])
        return onnx_attention(*args, **options)

    modules = ((_kind(module), module) for module in model.modules())
    handles = [module.register_forward_hook(count(kind)) for kind, module in modules if kind is not None]
    AttentionInterface.register(ONNX_ATTENTION, attend)
    try:
        yield seen
    finally:
        AttentionInterface.register(ONNX_ATTENTION, onnx_attention)
        for handle in handles:
            handle.remove()


def _kind(module: nn.Module) -> str | None:
    name = type(module).__name__
    if isinstance(module, nn.LayerNorm) or name.endswith(("RMSNorm", "LayerNorm")):
        return NORM
    return ACTIVATION if "GELU" in name else None


def spelled_out(graph: ir.Graph) -> Counter[str]:
    """How many of each kind the finished graph holds in the form of plain operators."""
    found: Counter[str] = Counter()
    for node in graph.all_nodes():
        for kind, is_one in _PLAIN_FORMS.items():
            found[kind] += is_one(node)
    return +found


def _is_plain_attention(node: ir.Node) -> bool:
    """A softmax over products of activations, and a product of it with activations again."""
    if node.op_type != "Softmax":
        return False
    return any(_mixes(before) for before in _reached(node, back=True)) and any(
        _mixes(after) for after in _reached(node, back=False)
    )


def _is_plain_norm(node: ir.Node) -> bool:
    """The root of a mean of squares, to which something small may be added."""
    if node.op_type not in ("Sqrt", "Rsqrt") and not _raises_to(node, -0.5) and not _raises_to(node, 0.5):
        return False
    source = _maker(node.inputs[0])
    parts = source.inputs if source is not None and source.op_type in ("Add", "Max", "Clip") else node.inputs[:1]
    makers = [_maker(part) for part in parts]
    return any(maker is not None and maker.op_type == "ReduceMean" for maker in makers)


def _is_plain_gelu(node: ir.Node) -> bool:
    """An ``Erf``; or 1 + tanh(…) of a sum that a cube is part of; or a sigmoid of 1.702 x."""
    if node.op_type == "Erf":
        return True
    if node.op_type == "Sigmoid":
        scaled = _maker(node.inputs[0])
        return scaled is not None and scaled.op_type == "Mul" and any(_is_near(v, 1.702) for v in scaled.inputs)
    if node.op_type != "Tanh" or not any(
        after.op_type == "Add" and any(_is_near(value, 1.0) for value in after.inputs)
        for after in node.outputs[0].consumers()
    ):
        return False
    scaled = _maker(node.inputs[0])
    return scaled is not None and scaled.op_type in ("Mul", "Add")


def _is_plain_rotary(node: ir.Node) -> bool:
    """Halves of one tensor, or every other number of it, changed over with one of them negated."""
    if node.op_type != "Concat" or len(node.inputs) != 2:
        return False
    negative, kept = (_maker(value, "Unsqueeze") for value in node.inputs)
    if negative is None or negative.op_type != "Neg":
        return False
    negated = _maker(negative.inputs[0])
    if negated is None or kept is None or negated.op_type != kept.op_type or kept.op_type not in ("Slice", "Split"):
        return False
    return negated.inputs[0] is kept.inputs[0]


_PLAIN_FORMS = {
    ATTENTION: _is_plain_attention,
    NORM: _is_plain_norm,
    ACTIVATION: _is_plain_gelu,
    ROTARY: _is_plain_rotary,
}


def _reached(node: ir.Node, *, back: bool) -> Iterator[ir.Node]:
    """The first nodes before or after this one that do more than carry its values."""
    seen, ahead = {node}, [node]
    while ahead:
        current = ahead.pop()
        if back:
            near = [maker for value in current.inputs if (maker := _maker(value)) is not None]
        else:
            near = [reader for value in current.outputs for reader in value.consumers()]
        for other in near:
            if other not in seen:
                seen.add(other)
                if other.op_type in _CARRY:
                    ahead.append(other)
                else:
                    yield other


def _mixes(node: ir.Node) -> bool:
    """Whether it is a product of two activations."""
    return node.op_type in _PRODUCTS and not any(value is None or _is_constant(value) for value in node.inputs[:2])


def _is_constant(value: ir.Value) -> bool:
    """A weight, or what was made of one by turning or casting it."""
    while (maker := value.producer()) is not None and maker.op_type in ("Cast", "Identity", "Reshape", "Transpose"):
        source = maker.inputs[0]
        if source is None:
            return False
        value = source
    return value.is_initializer() or (maker is not None and maker.op_type == "Constant")


def _maker(value: ir.Value | None, *more: str) -> ir.Node | None:
    """What makes a value, casts and these operators left out."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Cast", "Identity", *more):
        source = node.inputs[0]
        node = None if source is None else source.producer()
    return node


def _raises_to(node: ir.Node, exponent: float) -> bool:
    return node.op_type == "Pow" and _is_near(node.inputs[1], exponent)


def _is_near(value: ir.Value | None, number: float) -> bool:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size == 1 and abs(float(tensor.numpy().reshape(-1)[0]) - number) < 1e-2


def missing(expected: Mapping[str, int], fusions: Mapping[str, int]) -> list[str]:
    """A sentence for each kind of operator that the graph has fewer of than it could have.

    >>> missing({"norm": 3}, {"LayerNormalization": 2})
    ['1 of 3 norms is not one operator in the graph, which will be slower for it']
    """
    sentences = []
    for kind, count in expected.items():
        short = count - sum(fusions.get(operator, 0) for operator in OPERATORS[kind])
        if short > 0:
            verb = "is not one operator" if short == 1 else "are not one operator each"
            sentences.append(f"{short} of {count} {kind}s {verb} in the graph, which will be slower for it")
    return sentences
