"""PEFT LoRA adapters merged into a model: exactly where they fit, re-truncated where they do not.

An adapter trained on the factors themselves, or on a dense model, is merged by PEFT. One that was trained on
the dense model and meets a two-factor layer makes ``[up, s·B] @ [down; A]`` of it, of rank r + k, which is
cut back to rank r in the layer's metric. PEFT reads the adapter and decides every scale in all cases; the
adapter is first loaded onto a skeleton without weights, so that a misfit shows before the model is touched.

Layers that share ``down`` are one such product: their outputs are stacked, every A is added to ``down``, the B stand
side by side, and the sum of the metrics decides what is kept.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from converters.adapter_files import ADAPTER_NAME, AdapterInfo, check_adapter, is_duplicate, plain_name
from converters.errors import InputError
from converters.lowrank import Factors, LowRankLinear, low_rank_layers, shared_groups
from converters.retruncation import relative_error, retruncate

__all__ = [
    "AdapterInfo",
    "MergeReport",
    "MergedLayer",
    "check_adapter",
    "check_fit",
    "merge_dense_adapter",
    "merge_into_factors",
    "retruncate",
]

Metric = Callable[[str], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class MergedLayer:
    """``error`` is ‖G^½ (W − Ŵ) C^½‖ / ‖G^½ W C^½‖, W being the product before it was cut back; ``exact``
    says that this is no more than rounding."""

    error: float
    exact: bool


@dataclass(frozen=True)
class MergeReport:
    """What became of every layer with a LoRA pair, and of those that share ``down`` with one, by name, and the tensors
    that were taken whole."""

    layers: Mapping[str, MergedLayer]
    replaced: tuple[str, ...]


def check_fit(model: PreTrainedModel, adapter: Path) -> None:
    """Refuse an adapter that ``merge_dense_adapter`` would refuse; works on a model without weights (meta) too.

    Raises:
        InputError: the adapter is not plain LoRA, was trained for another base, or changes a ``down`` that layers
            share.
    """
    _check_shared(adapter, check_adapter(adapter), shared_groups(model))
    _check_fit(_skeleton(model), adapter)


def merge_dense_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Merge an adapter into the linears that it was trained on, through PEFT, in place; returns the model.

    Raises:
        InputError: the adapter is not plain LoRA or was trained for another base; the model is unchanged.
    """
    check_fit(model, adapter)
    with _kept_flags(model):
        return _load(model, adapter).merge_and_unload()


def merge_into_factors(model: PreTrainedModel, adapter: Path, metric: Metric | None = None) -> MergeReport:
    """Merge an adapter into a factored model, in place, every layer keeping its rank.

    Args:
        model: has two-factor linears; dense linears may remain.
        adapter: trained on this model's factors, or on the dense model that it was made from.
        metric: by layer name, C (n×n) and G (m×m) of the metric tr(G Δ C Δᵀ) in which a two-factor layer
            is cut back to its rank; None stands for the identity. Layers that share ``down`` read one input, so
            the first one's C serves all.

    Raises:
        InputError: the adapter is not plain LoRA, was trained for another base, or changes a ``down`` that layers
            share; the model is unchanged.
    """
    info = check_adapter(adapter)
    factored = low_rank_layers(model)
    if any(name.rpartition(".")[0] in factored for name in info.ranks):
        merge_dense_adapter(model, adapter)
        return MergeReport({name: MergedLayer(0.0, True) for name in info.ranks}, info.replaced)
    skeleton = _skeleton(model)
    _hide_factors(skeleton, low_rank_layers(skeleton))
    _check_fit(skeleton, adapter, factored)
    layers = {name: MergedLayer(0.0, True) for name in info.ranks}
    merged: dict[str, Factors] = {}
    for group in _groups(model):
        pairs = [_pair(skeleton.get_submodule(name), factored[name]) for name in group]
        if any(pair.rank for pair in pairs):
            metrics = [metric(name) if metric else (None, None) for name in group]
            cut, reports = _merge_pairs([factored[name] for name in group], pairs, metrics)
            merged |= zip(group, cut, strict=True)
            layers |= zip(group, reports, strict=True)
    with _kept_flags(model):
        _hide_factors(model, factored)
        loaded = _load(model, adapter)
        for name, layer in factored.items():
            model.set_submodule(name, layer)
        loaded.merge_and_unload()
    for name, factors in merged.items():
        _set_factors(factored[name], factors)
    return MergeReport(layers, info.replaced)


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model whose parameters have shape, dtype and device, but no memory of their own."""
    return copy.deepcopy(model, {id(p): _weightless(p.shape, p) for p in model.parameters()})


def _weightless(shape: tuple[int, ...], like: Tensor) -> nn.Parameter:
    one = torch.zeros((), dtype=like.dtype, device=like.device)
    return nn.Parameter(one.expand(shape), requires_grad=False)


def _hide_factors(model: nn.Module, factored: Mapping[str, LowRankLinear]) -> None:
    """Put a weightless dense linear, with the layer's own bias, where each two-factor linear stands."""
    for name, layer in factored.items():
        m, n = layer.out_features, layer.in_features
        dense = nn.Linear(n, m, bias=layer.bias is not None, device="meta")
        dense.weight = _weightless((m, n), layer.up.weight)
        dense.bias = layer.up.bias
        model.set_submodule(name, dense)


def _load(model: PreTrainedModel, adapter: Path, assign: bool = False) -> PeftModel:
    """Raises InputError naming the first thing in the adapter, or in the model, without a counterpart."""
    try:
        config = LoraConfig.from_pretrained(str(adapter))
        config.base_model_name_or_path = None  # PEFT warns about any change of name
        loaded = get_peft_model(model, config, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=assign)
        device = "cpu" if model.device.type == "meta" else str(model.device)  # safetensors cannot read onto meta
        result = loaded.load_adapter(str(adapter), ADAPTER_NAME, torch_device=device, low_cpu_mem_usage=assign)
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{adapter} does not fit the model: {_first_mismatch(error)}") from error
    unexpected = [key for key in result.unexpected_keys if not is_duplicate(key)]
    if unexpected:
        raise InputError(f"{adapter} is for another base: the model has no {plain_name(unexpected[0])}")
    if result.missing_keys:
        raise InputError(f"{adapter} is for another base: it has no {plain_name(result.missing_keys[0])}")
    return loaded


def _first_mismatch(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return plain_name(next((line for line in lines if "size mismatch" in line), lines[0]))


def _check_fit(skeleton: PreTrainedModel, adapter: Path, factored: Mapping[str, LowRankLinear] | None = None) -> None:
    """Load the adapter onto a skeleton, and look for what merging would get wrong."""
    named = list(skeleton.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for _, parameter in named)
    tied = {name for name, parameter in named if uses[id(parameter)] > 1}
    _load(skeleton, adapter, assign=True)
    for name, module in skeleton.named_modules():
        if isinstance(module, LoraLayer):
            _check_lora_layer(adapter, name, module, tied)
        elif isinstance(module, ModulesToSaveWrapper):
            inside = [layer for layer in factored or () if f"{layer}.".startswith(f"{name}.")]
            if inside:
                raise InputError(
                    f"{adapter} replaces {name} whole (modules_to_save), but {inside[0]} is factored: "
                    "merge it before compression, or leave that layer dense"
                )


def _check_shared(adapter: Path, info: AdapterInfo, groups: Sequence[Sequence[str]]) -> None:
    """PEFT wraps a shared module under its first name only, so that its adapter works on that one layer."""
    for group in groups:
        for name in group:
            if f"{name}.down" in info.ranks or f"{name}.down.weight" in info.replaced:
                raise InputError(
                    f"{adapter} changes {name}.down for that layer alone, but {', '.join(group)} hold one down between "
                    "them: merging would change them all. Train an adapter of the up factors or of the dense model"
                )


def _check_lora_layer(adapter: Path, name: str, lora: LoraLayer, tied: Set[str]) -> None:
    if variant := lora.lora_variant.get(ADAPTER_NAME):
        raise InputError(f"{adapter}: {name} is not plain LoRA ({type(variant).__name__})")
    if f"{name}.weight" in tied:
        raise InputError(
            f"{adapter}: the weight of {name} is tied to another layer, which merging would change too: "
            "untie the model first (tie_word_embeddings=False and a copy of the weight)"
        )
    if lora.lora_bias.get(ADAPTER_NAME) and lora.get_base_layer().bias is None:
        raise InputError(f"{adapter} carries a LoRA bias for {name}, which has no bias to add it to")


def _groups(model: nn.Module) -> list[tuple[str, ...]]:
    """The two-factor layers, those that share ``down`` together."""
    shared = shared_groups(model)
    grouped = {name for group in shared for name in group}
    return shared + [(name,) for name in low_rank_layers(model) if name not in grouped]


def _pair(lora: nn.Module, layer: LowRankLinear) -> Factors:
    """What a layer's adapter adds to its product, of rank 0 without one, and in ``bias`` what it adds to its bias."""
    if not isinstance(lora, LoraLayer):
        return Factors(
            layer.up.weight.new_zeros(layer.out_features, 0), layer.up.weight.new_zeros(0, layer.in_features)
        )
    down: Any = lora.lora_A[ADAPTER_NAME]
    up: Any = lora.lora_B[ADAPTER_NAME]
    scale = lora.scaling[ADAPTER_NAME]
    bias = None if up.bias is None else scale * up.bias.detach()
    return Factors(scale * up.weight.double(), down.weight.double(), bias)


@torch.no_grad()
def _merge_pairs(
    layers: Sequence[LowRankLinear], pairs: Sequence[Factors], metrics: Sequence[tuple[Tensor | None, Tensor | None]]
) -> tuple[list[Factors], list[MergedLayer]]:
    """The new factors of one layer or of layers that share ``down``, and in ``bias`` what to add to their biases."""
    first, C = layers[0], metrics[0][0]
    sizes = [layer.out_features for layer in layers]
    stacked = torch.cat([layer.up.weight.double() for layer in layers])
    beside = torch.block_diag(*(pair.up.double() for pair in pairs))
    downs = [first.down.weight.double(), *(pair.down.double() for pair in pairs)]
    full = Factors(torch.cat([stacked, beside], dim=1), torch.cat(downs))
    cut = retruncate(full, first.rank, C, _blocks([G for _, G in metrics], sizes))
    dtype = first.up.weight.dtype
    down = cut.down.to(dtype)
    factors, reports = [], []
    rows = zip(full.up.split(sizes), cut.up.split(sizes), pairs, metrics, strict=True)
    for whole, up, pair, (_, G) in rows:
        factors.append(Factors(up.to(dtype), down, pair.bias))
        error = relative_error(Factors(whole, full.down), factors[-1], C, G)
        reports.append(MergedLayer(error, exact=error <= 4 * torch.finfo(dtype).eps))
    return factors, reports


def _blocks(metrics: Sequence[Tensor | None], sizes: Sequence[int]) -> list[Tensor] | None:
    """The output metrics of stacked layers; identities beside others are written out."""
    if all(G is None for G in metrics):
        return None
    return [torch.eye(size) if G is None else G for G, size in zip(metrics, sizes, strict=True)]


@torch.no_grad()
def _set_factors(layer: LowRankLinear, factors: Factors) -> None:
    layer.up.weight.copy_(factors.up)
    layer.down.weight.copy_(factors.down)
    if factors.bias is not None:
        layer.up.bias.add_(factors.bias)


@contextmanager
def _kept_flags(model: PreTrainedModel) -> Iterator[None]:
    """PEFT freezes the base model and switches it to eval mode; restore both."""
    training, trainable = model.training, {name: p.requires_grad for name, p in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
    model.train(training)
