"""Which layers are compressed, for families of every kind."""

import pytest
import torch
import transformers
from torch import nn

from converters.errors import InputError
from converters.selection import select_layers


def small(model_class, config_class, **changes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.device("meta"):
        return model_class(config_class(**(sizes | changes)))


def test_vit_and_bert_leave_embeddings_pooler_and_head_dense():
    vit = select_layers(
        small(transformers.ViTForImageClassification, transformers.ViTConfig, image_size=8, patch_size=4)
    )
    assert len(vit) == 12
    assert not any("classifier" in name or "embeddings" in name for name in vit)
    bert = select_layers(small(transformers.BertForSequenceClassification, transformers.BertConfig, vocab_size=30))
    assert len(bert) == 12
    assert not any("pooler" in name or "classifier" in name for name in bert)


def test_gpt2_conv1d_and_llama():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30))
    assert len(select_layers(gpt2)) == 8
    llama = small(transformers.LlamaForCausalLM, transformers.LlamaConfig, vocab_size=30)
    names = select_layers(llama)
    assert len(names) == 14
    assert "lm_head" not in names


def test_routers_stay_dense():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 4)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.out = nn.Linear(8, 8)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = transformers.PretrainedConfig(num_experts=4)
            self.blocks = nn.ModuleList(Block() for _ in range(2))

    names = select_layers(Model())
    assert not any(name.endswith("gate") for name in names)
    assert any(name.endswith("out") for name in names)
    assert any("experts" in name for name in names)
    assert "blocks.0.gate" in select_layers(Model(), include=["*.gate"])


def test_patterns():
    bert = small(transformers.BertForSequenceClassification, transformers.BertConfig, vocab_size=30)
    assert list(select_layers(bert, include=["classifier"])) == ["classifier"]
    assert len(select_layers(bert, exclude=["*.query", "*.key"])) == 8
    assert len(select_layers(bert, include=["*.layer.0.*"], exclude=["*.output.dense"])) == 4
    with pytest.raises(InputError, match=r"'\*nothing\*' matches no linear layer"):
        select_layers(bert, include=["*nothing*"])
    with pytest.raises(InputError, match="matches no linear layer"):
        select_layers(bert, exclude=["*nothing*"])
    with pytest.raises(InputError, match="no layer is left"):
        select_layers(bert, exclude=["*"])


def test_a_model_of_convolutions_is_told_that_they_are_not_compressed():
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))
    with pytest.raises(InputError, match=r"repeated blocks \(convolutions .*such as classifier\.1, can be named with"):
        select_layers(model)
    with pytest.raises(InputError, match="--exclude removes all layers"):
        select_layers(model, include=["classifier.*"], exclude=["*"])


def test_a_layer_with_several_names_is_found_by_any_and_goes_by_the_first():
    model = nn.Module()
    model.front = nn.Linear(8, 8)
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])
    model.blocks[1].append(model.front)
    assert list(select_layers(model)) == ["front", "blocks.0.0", "blocks.1.0"]
    assert list(select_layers(model, include=["blocks.1.1"])) == ["front"]
    assert list(select_layers(model, exclude=["blocks.1.1"])) == ["blocks.0.0", "blocks.1.0"]


def test_tied_weights_are_refused_by_name():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        tie_word_embeddings=True,
    )
    with pytest.raises(InputError, match="tied"):
        select_layers(transformers.LlamaForCausalLM(config), include=["lm_head"])
