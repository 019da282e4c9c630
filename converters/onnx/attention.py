"""Use ONNX's own ``Attention`` operator (opset 23) as a model's attention while it is traced.

To find attention in a finished graph, one would have to know how each architecture, transformers release and mask
writes its softmax. But transformers calls attention through a registry, so the operator can be traced directly. The
key/value heads of grouped-query attention are then not repeated, and the mask is the one that the model computes, so
padding on either side, sliding windows and any split into past and new tokens are exact. ONNX Runtime's
``GroupQueryAttention`` is no alternative: it refuses several new tokens after a past for batches above one, and counts
the rotary positions of a prompt from the start of the sequence, whatever ``position_ids`` says.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn, onnx
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from converters.model_config import attention_of

ONNX_ATTENTION = "onnx"
PLAIN_ATTENTION = "eager"

# Options of attention, beyond scale and mask, that the operator does not support.
_UNSUPPORTED = ("s_aux", "position_bias", "head_mask")


def onnx_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention with ONNX's operator: query (B, H, S, d), key and value (B, H_kv, T, d), additive mask
    (B, 1, S, T) → (B, S, H, d).

    Raises:
        NotImplementedError: the model uses an option that the operator does not support.
    """
    refuse(options, "softcap")
    if attention_mask is None and (module.is_causal if is_causal is None else is_causal):
        raise NotImplementedError("causal attention without a mask")
    output = onnx.ops.attention(query, key, value, attention_mask, scale=scaling)[0]
    return output.transpose(1, 2).contiguous(), None


def refuse(options: Mapping[str, Any], *more: str) -> None:
    """Check that a model's attention uses no unsupported options; ``more`` names further unsupported options.

    Raises:
        NotImplementedError: it uses some.
    """
    unsupported = [name for name in (*more, *_UNSUPPORTED) if options.get(name) is not None]
    if unsupported:
        raise NotImplementedError(f"attention with {', '.join(unsupported)}")


def additive_mask(
    *,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    **options: Any,
) -> Tensor | None:
    """Return the additive mask; None if every token sees every other. While tracing, transformers creates even such a
    mask, since it cannot distinguish a mask of ones from others; without a padding mask, there is nothing to
    distinguish."""
    if attention_mask is None and allow_is_bidirectional_skip and local_size is None:
        return None
    return eager_mask(attention_mask=attention_mask, local_size=local_size, **options)


AttentionInterface.register(ONNX_ATTENTION, onnx_attention)
AttentionMaskInterface.register(ONNX_ATTENTION, additive_mask)


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let the model use the named attention within the block; models that do not use the registry keep their own."""
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = {key: attention_of(config) for key, config in configs.items()}
    try:
        if model._can_set_attn_implementation():
            model.set_attn_implementation(name)
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
