"""Shared fixtures: small models with random or briefly trained weights in folders, with tokenizer and data."""

import csv
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from converters.folder import save_folder

torch.set_num_threads(1)  # the models are tiny; more threads only fight over the cores

WORDS = ["good", "great", "fine", "happy", "bright", "bad", "poor", "sad", "dull", "grim"]
WORDS += ["the", "a", "film", "plot", "cast", "was", "is", "very", "not", "and"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory) -> Path:
    """A ViT for 8×8 digits, random weights."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )
    processor = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})
    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    save_folder(transformers.ViTForImageClassification(config), folder, processor)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=48,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    save_folder(transformers.BertForSequenceClassification(config), folder, word_tokenizer())
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,  # logits far enough apart that greedy decoding is no toss-up
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_folder(transformers.LlamaForCausalLM(config), folder, word_tokenizer())
    return folder


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=3,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    save_folder(transformers.GPT2LMHeadModel(config), folder, word_tokenizer())
    return folder


def sentence(seed: int) -> tuple[str, str]:
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(3, 12, (1,), generator=generator))
    words = [WORDS[at] for at in torch.randint(len(WORDS), (length,), generator=generator).tolist()]
    return " ".join(words), "positive" if seed % 2 else "negative"


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> Path:
    """A CSV of sentences with string labels and column names that no list would hold."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what was said", "label"])
        writer.writerows(sentence(seed) for seed in range(160))
    return path


@pytest.fixture(scope="session")
def prose(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prose.txt"
    path.write_text("\n".join(sentence(seed)[0] for seed in range(400)))
    return path
