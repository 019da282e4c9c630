"""Two-layer models of several families, and their factored forms, for tests."""

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from converters.lowrank import DenseLinear, Factors, dense_weight, factorize

torch.set_num_threads(1)  # models this small only lose time to several threads

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}
TEXT = {**SIZES, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
FAMILIES = {
    "bert": (BertForSequenceClassification, BertConfig(**TEXT)),
    "bert-mlm": (BertForMaskedLM, BertConfig(**TEXT)),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**TEXT)),
    "distilbert": (
        DistilBertForSequenceClassification,
        DistilBertConfig(vocab_size=50, dim=32, hidden_dim=64, n_layers=2, n_heads=4, initializer_range=0.2),
    ),
    "vit": (ViTForImageClassification, ViTConfig(**IMAGE)),
    "deit": (DeiTForImageClassification, DeiTConfig(**IMAGE)),
    "llama": (LlamaForCausalLM, LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=False)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**TEXT, num_key_value_heads=2, tie_word_embeddings=True)),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            word_embed_proj_dim=32,
        ),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=0, eos_token_id=0
        ),
    ),
}


def build(family, dtype=torch.float32, seed=0, **changes):
    """A model with random weights in eval mode; ``changes`` go to its config."""
    model_class, config = FAMILIES[family]
    torch.manual_seed(seed)
    return model_class._from_config(type(config)(**{**config.to_dict(), **changes}), dtype=dtype).eval()


def inputs(model, batch=2):
    generator = torch.Generator().manual_seed(0)
    if "pixel_values" in model.main_input_name:
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator).to(model.dtype)}
    return {"input_ids": torch.randint(2, 50, (batch, 7), generator=generator)}


@torch.no_grad()
def logits(model):
    return model(**inputs(model)).logits


def linears(model, head=False):
    """The dense linears of at least 16×16 by name, the output embedding only on request."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, DenseLinear)
        and min(dense_weight(layer).shape) >= 16
        and (head or layer is not model.get_output_embeddings())
    }


@torch.no_grad()
def svd_factors(layer, rank):
    weight = dense_weight(layer).detach()
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    up, down = u[:, :rank] * s[:rank], vt[:rank]
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return Factors(up.to(weight.dtype), down.to(weight.dtype), bias)


def truncated(model, rank=6, keep=lambda name: True, head=False):
    """Factorise the model in place by plain SVD."""
    layers = linears(model, head)
    return factorize(model, {name: svd_factors(layer, rank) for name, layer in layers.items() if keep(name)})
