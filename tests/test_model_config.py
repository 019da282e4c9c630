"""What is read from configurations: of every family that transformers knows, and of those with fields of their own."""

import pytest
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from converters import model_config
from converters.model_config import (
    end_tokens,
    image_channels,
    image_size,
    in_vocabulary,
    positions,
    special_tokens,
    text_config,
    token_types,
    vocabulary_size,
    without_cache,
)

MAPPINGS = (
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
READERS = {
    name: value
    for name, value in vars(model_config).items()
    if callable(value) and getattr(value, "__module__", None) == model_config.__name__ and not name.startswith("_")
}


def default_configs():
    for family in sorted({name for names in MAPPINGS for name in names}):
        try:
            yield family, CONFIG_MAPPING[family]()
        except Exception:  # needs arguments, or a package that is not installed
            continue


def test_every_family_can_be_read():
    count = 0
    for family, config in default_configs():
        for name, read in READERS.items():
            try:
                read(*{"in_vocabulary": (0, config), "shorten": (config, {12: [0, 1]})}.get(name, (config,)))
            except Exception as error:
                pytest.fail(f"{name} of {family}: {type(error).__name__}: {error}")
        with without_cache(config):
            pass
        for number in (vocabulary_size(config), positions(config), image_channels(config)):
            assert number is None or number > 0, family
        count += 1
    assert count > 200


def test_fields_that_a_family_lacks_are_none_or_empty():
    mobilebert = transformers.MobileBertConfig()
    assert not hasattr(mobilebert, "eos_token_id")
    assert end_tokens(mobilebert) == special_tokens(mobilebert) == ()
    convnext = transformers.ConvNextConfig()
    assert vocabulary_size(convnext) is positions(convnext) is token_types(convnext) is None
    assert in_vocabulary(10**6, convnext)
    assert not in_vocabulary(None, convnext)
    assert positions(transformers.BloomConfig()) is None
    assert image_size(transformers.SegformerConfig()) is None


def test_fields_under_other_names_are_found():
    assert positions(transformers.GPT2Config(n_positions=64)) == 64
    assert positions(transformers.MptConfig(max_seq_len=96)) == 96
    assert vocabulary_size(transformers.XLMConfig(vocab_size=70)) == 70


def test_fields_of_nested_configurations_are_found():
    siglip = transformers.SiglipConfig(vision_config={"image_size": 96, "num_channels": 1})
    assert image_size(siglip) == (96, 96)
    assert image_channels(siglip) == 1
    gemma = transformers.Gemma3Config(text_config={"vocab_size": 80, "eos_token_id": [1, 106]})
    assert vocabulary_size(gemma) == 80
    assert end_tokens(gemma) == (1, 106)
    assert special_tokens(gemma) == (1,)


def test_an_image_size_may_be_a_number_or_two():
    assert image_size(transformers.ViTConfig(image_size=32)) == (32, 32)
    assert image_size(transformers.ViTConfig(image_size=[32, 48])) == (32, 48)


def test_no_cache_holds_in_every_part_and_is_undone():
    gemma = transformers.Gemma3Config(text_config={"use_cache": True})
    with without_cache(gemma):
        assert text_config(gemma).use_cache is False
    assert text_config(gemma).use_cache is True
