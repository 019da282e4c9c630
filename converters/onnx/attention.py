"""Attention as ONNX's own ``Attention`` operator (opset 23), put in place of a model's attention while it is traced.

Matching the operator in a finished graph depends on how each architecture, transformers release and mask spells
its softmax. transformers calls attention through a registry instead, so the operator can be traced directly, with
the key/value heads of grouped-query attention unrepeated and the mask as the model computes it: padding on either
side, sliding windows and any split into past and new tokens stay exact. ONNX Runtime's ``GroupQueryAttention``
does not offer that: it refuses several new tokens after a past for batches above one, and takes the rotary
positions of a prompt from the sequence's start whatever ``position_ids`` says.
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

# What an attention may be asked to do beyond scale and mask; the operator has no equal for these.
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
    """query (B, H, S, d), key and value (B, H_kv, T, d), additive mask (B, 1, S, T) → (B, S, H, d).

    Raises:
        NotImplementedError: the model asks for something that the operator cannot do.
    """
    refuse(options, "softcap")
    if attention_mask is None and (module.is_causal if is_causal is None else is_causal):
        raise NotImplementedError("causal attention without a mask")
    output = onnx.ops.attention(query, key, value, attention_mask, scale=scaling)[0]
    return output.transpose(1, 2).contiguous(), None


def refuse(options: Mapping[str, Any], *more: str) -> None:
    """Raises:
    NotImplementedError: the model asks its attention for something of which there is no equal here.
    """
    asked = [name for name in (*more, *_UNSUPPORTED) if options.get(name) is not None]
    if asked:
        raise NotImplementedError(f"attention with {', '.join(asked)}")


def additive_mask(
    *,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    **options: Any,
) -> Tensor | None:
    """The additive mask; none where every token sees every other. transformers materialises that one while tracing,
    for it cannot tell a mask of ones from another; but without a padding mask there is nothing to tell."""
    if attention_mask is None and allow_is_bidirectional_skip and local_size is None:
        return None
    return eager_mask(attention_mask=attention_mask, local_size=local_size, **options)


AttentionInterface.register(ONNX_ATTENTION, onnx_attention)
AttentionMaskInterface.register(ONNX_ATTENTION, additive_mask)


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let the model use the named attention; models that do not use the registry keep their own."""
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = {key: attention_of(config) for key, config in configs.items()}
    try:
        if model._can_set_attn_implementation():
            model.set_attn_implementation(name)
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
