"""How many fused operators a graph should hold, counted in the model while it runs.

A fusion that finds no match says nothing; the graph is right and slow. So the norms, activations and attentions that a
forward pass goes through are counted, and compared with the operators that the finished graph has.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from converters.onnx.attention import ONNX_ATTENTION, onnx_attention

ATTENTION, NORM, ACTIVATION = "attention", "norm", "GELU"

# What each becomes in a fused graph; any of them will do.
OPERATORS = {
    ATTENTION: {"ScaledDotProductAttention"},
    NORM: {"LayerNormalization", "RMSNormalization"},
    ACTIVATION: {"Gelu", "FastGelu", "QuickGelu"},
}


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


def missing(expected: Mapping[str, int], fusions: Mapping[str, int]) -> list[str]:
    """A sentence for each kind of operator that the graph has fewer of than the model goes through.

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
