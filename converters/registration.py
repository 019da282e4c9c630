"""Teach transformers to load folders of factored models.

The ranks are stored in ``config.json`` as a ``quantization_config``. This is the place that transformers provides for
layers that differ from the architecture. A quantizer registered under our name replaces the dense layers by empty
factors before any weight is read.

transformers only *warns* about a ``quant_method`` that is not registered, and then returns random weights. So
``config.json`` also names an impossible ``transformers_weights`` file, which transformers checks before it reads any
weight. A process that did not call `register_auto_model` then gets a ValueError that tells it to. Tools that only read
``model_type`` are not affected.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from converters.errors import InputError
from converters.lowrank import LowRankLinear, factorize_empty, low_rank_layers, shared_groups

QUANT_METHOD = "prehab_lowrank"
FORMAT_VERSION = 1
GUARD = (
    "none, these are low-rank factors: load with converters.folder.from_pretrained, "
    "or call converters.folder.register_auto_model() first (pip install prehab-export)"
)


@dataclass
class LowRankConfig(QuantizationConfigMixin):
    """The ``quantization_config`` entry of ``config.json``.

    ranks: the rank of every compressed layer, by name.
    shared: groups of layers that share one ``down``, which is stored under the name of the first.

    Raises:
        InputError: an unknown format version, or ranks and groups that contradict each other.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    shared: list[list[str]] = field(default_factory=list)
    format_version: int = FORMAT_VERSION
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]  # an enum of transformers' own methods

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise InputError(
                f"low-rank format version {self.format_version} is unknown; this release reads "
                f"version {FORMAT_VERSION}: upgrade prehab-export"
            )
        for name, rank in self.ranks.items():
            if type(rank) is not int or rank < 1:
                raise InputError(f"config.json: the rank of {name} is {rank!r}, not a positive integer")
        members = [name for group in self.shared for name in group]
        if len(set(members)) < len(members):
            raise InputError("config.json: a layer shares its down factor with two groups")
        for group in self.shared:
            if len({self.ranks.get(name) for name in group} - {None}) != 1 or not self.ranks.keys() >= set(group):
                raise InputError(f"config.json: {', '.join(group)} share a down factor but not one rank")


class LowRankQuantizer(HfQuantizer):
    """Replaces dense layers by empty factors while the model is still on the meta device."""

    quantization_config: LowRankConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        # This is the only hook that gets the model's config before the weights file is looked up.
        return without_guard(config)

    update_tp_plan = update_attn_implementation  # the same hook in transformers before 5.21

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        ranks = self.quantization_config.ranks
        names = _names_within(model, ranks)
        groups = [[names[name] for name in group] for group in self.quantization_config.shared if group[0] in names]
        factorize_empty(model, {names[name]: rank for name, rank in ranks.items() if name in names}, groups)
        # The file holds a shared tensor once; the model has several names for it.
        model.all_tied_weights_keys |= {
            f"{name}.down.weight": f"{first}.down.weight" for first, *others in groups for name in others
        }
        parameter_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        tied = model.all_tied_weights_keys | other_names(model)
        model.all_tied_weights_keys = {key: source for key, source in tied.items() if {key, source} <= parameter_names}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # Factors are ordinary floating-point weights: allow .half(), .float() and training.
        model.is_quantized = False  # type: ignore[assignment]
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        # save_pretrained calls this before it writes the config; ranks may have changed since loading.
        self.quantization_config.ranks = ranks_of(model)
        self.quantization_config.shared = shared_of(model)
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register_auto_model() -> None:
    """Let ``AutoModelFor….from_pretrained`` (and that of every concrete class) load folders of factored models.

    This changes transformers' tables for the whole process; calling it again does nothing.
    """
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(LowRankConfig)
        register_quantizer(QUANT_METHOD)(LowRankQuantizer)


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Return the rank of every two-factor linear, by layer name."""
    return {name: layer.rank for name, layer in low_rank_layers(model).items()}


def shared_of(model: nn.Module) -> list[list[str]]:
    """Return the groups of layers that share one ``down``, sorted by their first names."""
    return sorted(list(group) for group in shared_groups(model))


def other_names(model: nn.Module) -> dict[str, str]:
    """Map the further names of parameters to their first names, for modules that are registered several times."""
    return {
        f"{name}.{part}": f"{first}.{part}"
        for name, first in module_places(model).items()
        for part, _ in model.get_submodule(name).named_parameters(recurse=False)
    }


def module_places(model: nn.Module) -> dict[str, str]:
    """Map the further names of modules that are registered several times to their first names. A ``down`` that layers
    share is not included; `shared_of` returns it."""
    first_names = {id(module): name for name, module in model.named_modules()}
    downs = {id(layer.down) for layer in low_rank_layers(model).values()}
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {id(module) for module in modules.values() if isinstance(module, LowRankLinear)}
    return {
        name: first_names[id(module)]
        for name, module in modules.items()
        if first_names[id(module)] != name
        and not (id(module) in downs and _is_under_first_name(name, modules, first_names, layers))
    }


def _is_under_first_name(
    name: str, modules: Mapping[str, nn.Module], first_names: Mapping[int, str], layers: Collection[int]
) -> bool:
    """Whether the parent in this name is a two-factor layer, named by its first name."""
    parent = name.rpartition(".")[0]
    return id(modules[parent]) in layers and first_names[id(modules[parent])] == parent


def without_guard(config: PreTrainedConfig) -> PreTrainedConfig:
    """Remove our impossible file name from a config, in place, so that the weights can be read."""
    if getattr(config, "transformers_weights", None) == GUARD:
        del config.transformers_weights
    return config


def _names_within(model: PreTrainedModel, saved: Iterable[str]) -> dict[str, str]:
    """Map saved layer names to their names in this model. If a task model's folder is loaded as the bare model, the
    prefix and the head are dropped; if a bare model's folder is loaded as a task model, the prefix is added."""
    names = list(saved)
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model:
        saved_with_head = any(name.startswith(prefix) for name in names)
        inner = [name for name in names if name.startswith(prefix) or not saved_with_head]
        return {name: name.removeprefix(prefix) for name in inner}
    modules = dict(model.named_modules())
    return {name: name if name in modules else prefix + name for name in names}
