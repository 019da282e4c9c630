"""How transformers learns to read a folder of factored models.

The ranks stand in ``config.json`` as a ``quantization_config``, the place that transformers offers for
layers that are not what the architecture says; a quantizer registered under our name puts empty factors
where the dense layers stood before any weight is read.

transformers only *warns* about a ``quant_method`` that nobody registered and then returns random weights.
So ``config.json`` also names an impossible ``transformers_weights`` file, which transformers checks before
it reads any weight: a process that did not call `register_auto_model` gets a ValueError that tells it to.
Tools that only read ``model_type`` are not disturbed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from converters.errors import InputError
from converters.lowrank import factorize_empty, low_rank_layers

QUANT_METHOD = "prehab_lowrank"
FORMAT_VERSION = 1
GUARD = (
    "none, these are low-rank factors: load with converters.folder.from_pretrained, "
    "or call converters.folder.register_auto_model() first (pip install prehab-export)"
)


@dataclass
class LowRankConfig(QuantizationConfigMixin):
    """The ``quantization_config`` entry of ``config.json``: the rank of every compressed layer, by name."""

    ranks: dict[str, int] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]  # an enum of transformers' own methods

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise InputError(
                f"low-rank format version {self.format_version} is unknown, this release reads "
                f"version {FORMAT_VERSION}: upgrade prehab-export"
            )
        for name, rank in self.ranks.items():
            if type(rank) is not int or rank < 1:
                raise InputError(f"config.json: the rank of {name} is {rank!r}, not a positive integer")


class LowRankQuantizer(HfQuantizer):
    """Puts empty factors where the dense layers stood, while the model is still on the meta device."""

    quantization_config: LowRankConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        # The one hook that sees the model's config before its weights file is looked up.
        return without_guard(config)

    update_tp_plan = update_attn_implementation  # that hook in transformers before 5.21

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        factorize_empty(model, _names_within(model, self.quantization_config.ranks))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # Factors are ordinary floats: allow .half(), .float() and training.
        model.is_quantized = False  # type: ignore[assignment]
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        # Called by save_pretrained before it writes the config: ranks may have changed since loading.
        self.quantization_config.ranks = ranks_of(model)
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register_auto_model() -> None:
    """Let ``AutoModelFor….from_pretrained`` (and every concrete class) read folders of factored models.

    Changes transformers' tables for this process; calling it again does nothing.
    """
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(LowRankConfig)
        register_quantizer(QUANT_METHOD)(LowRankQuantizer)


def ranks_of(model: nn.Module) -> dict[str, int]:
    """The rank of every two-factor linear, by layer name."""
    return {name: layer.rank for name, layer in low_rank_layers(model).items()}


def without_guard(config: PreTrainedConfig) -> PreTrainedConfig:
    """Take our impossible file name out of a config, in place, so that the weights can be read."""
    if getattr(config, "transformers_weights", None) == GUARD:
        del config.transformers_weights
    return config


def _names_within(model: PreTrainedModel, ranks: Mapping[str, int]) -> dict[str, int]:
    """Layer names as this model has them: a task model's folder read as the bare model lacks the prefix
    and the head; a bare model's folder read as a task model gains the prefix."""
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model:
        saved_with_head = any(name.startswith(prefix) for name in ranks)
        inner = {name: rank for name, rank in ranks.items() if name.startswith(prefix) or not saved_with_head}
        return {name.removeprefix(prefix): rank for name, rank in inner.items()}
    known = dict(model.named_modules())
    return {name if name in known else prefix + name: rank for name, rank in ranks.items()}
