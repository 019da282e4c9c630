"""Merge PEFT adapters into a model: exactly if they fit, or LoRA re-truncated to the layer's rank if it does not.

An adapter that was trained on the factors themselves, or on a dense model that is still dense, is merged by PEFT,
whatever its method, and the model must answer the same before and after. LoRA that was trained on a dense layer which
now has two factors turns the layer into ``[up, s·B] @ [down; A]``, of rank r + k. This is cut back to rank r in the
layer's metric. In all cases, PEFT reads the adapter and determines every scale. The adapter is first loaded onto a
skeleton without weights, so a mismatch is found before the model is changed.

If an adapter changes only one of several tied weights, or changes them differently, they are untied, both in the model
and in its config.

Layers that share ``down`` form one such product: their outputs are stacked, every A is appended to ``down``, the B
matrices form the blocks of a block-diagonal matrix, and the sum of the metrics decides what remains.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from converters.adapter_files import ADAPTER_NAME, AdapterInfo, check_adapter, is_duplicate, plain_name
from converters.errors import InputError
from converters.lowrank import Factors, LowRankLinear, low_rank_layers, shared_groups
from converters.model_config import end_tokens, image_size, restored_ties, untie_embeddings
from converters.onnx.inputs import image_inputs
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

# Largest allowed |Δ| of the logits due to merging, relative to the largest logit; rounding causes a hundredth of it.
_MERGE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}
_IMAGE_SIDE = 224  # pixels, for a model that takes any size


@dataclass(frozen=True)
class MergedLayer:
    """The result of merging one layer.

    error: ‖G^½ (W − Ŵ) C^½‖ / ‖G^½ W C^½‖, where W is the product before it was cut back to Ŵ.
    exact: whether the error is no more than rounding.
    """

    error: float
    exact: bool


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    layers: by name, every layer with a LoRA pair, and every layer that shares ``down`` with such a layer.
    replaced: names of the tensors that were replaced as a whole.
    """

    layers: Mapping[str, MergedLayer]
    replaced: tuple[str, ...]


def check_fit(model: PreTrainedModel, adapter: Path) -> None:
    """Check that ``merge_dense_adapter`` accepts an adapter; also works on a model without weights (meta device).

    Raises:
        InputError: the adapter's method cannot be merged, it was trained for another base, or it changes a ``down``
            that layers share.
    """
    _check_shared(adapter, check_adapter(adapter), shared_groups(model))
    _check_fit(_skeleton(model), adapter)


def merge_dense_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Merge an adapter into the modules that it was trained on, by PEFT and in place; returns the model.

    Raises:
        InputError: the adapter's method cannot be merged, or it was trained for another base; the model is unchanged.
            Or the merged model does not answer as it did with the adapter; the model is then unusable.
    """
    check_fit(model, adapter)
    with _restored_flags(model):
        loaded = _load(model, adapter).eval()
        expected = _answers(model)
        _merge_loaded(loaded, model)
        error = float((_answers(model) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not error <= _MERGE_TOLERANCE[model.dtype]:
        raise InputError(
            f"{adapter}: PEFT does not merge this adapter exactly; the merged model's logits are off by {error:.1e} of "
            "their scale"
        )
    return model


def merge_into_factors(model: PreTrainedModel, adapter: Path, metric: Metric | None = None) -> MergeReport:
    """Merge an adapter into a factored model, in place; every layer keeps its rank.

    Args:
        model: a model with two-factor linears; it may also have dense linears.
        adapter: an adapter that was trained on this model's factors, or on the dense model that they approximate.
        metric: returns C (n×n) and G (m×m) for a layer name: the metric tr(G Δ C Δᵀ) in which a two-factor layer is
            cut back to its rank. None stands for the identity. Layers that share ``down`` have one input, so the C of
            the first is used for all.

    Raises:
        InputError: the adapter was trained on the dense model and is not plain LoRA, was trained for another base, or
            changes a ``down`` that layers share; the model is unchanged.
    """
    info = check_adapter(adapter)
    factored = low_rank_layers(model)
    if adapted := [
        f"{name}.{side}" for name in factored for side in ("up", "down") if _touches(info, f"{name}.{side}")
    ]:
        merge_dense_adapter(model, adapter)
        return MergeReport({name: MergedLayer(0.0, True) for name in info.ranks or adapted}, info.replaced)
    if info.not_plain is not None:
        raise InputError(
            f"{adapter}: {info.not_plain} of the dense model cannot be merged into factors, only plain LoRA can; merge "
            "it before compression, with `run --adapter`, or train it on the factors"
        )
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
    with _restored_flags(model):
        _hide_factors(model, factored)
        loaded = _load(model, adapter)
        for name, layer in factored.items():
            model.set_submodule(name, layer)
        _merge_loaded(loaded, model)
    for name, factors in merged.items():
        _set_factors(factored[name], factors)
    return MergeReport(layers, info.replaced)


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model whose parameters have their shape, dtype and device, but take no memory."""
    return copy.deepcopy(model, {id(p): _weightless(p.shape, p) for p in model.parameters()})


def _weightless(shape: tuple[int, ...], like: Tensor) -> nn.Parameter:
    # Not on the meta device, because some methods read the weights that they start from.
    zero = torch.zeros((), dtype=like.dtype, device="cpu" if like.device.type == "meta" else like.device)
    return nn.Parameter(zero.expand(shape), requires_grad=False)


def _hide_factors(model: nn.Module, factored: Mapping[str, LowRankLinear]) -> None:
    """Replace each two-factor linear by a weightless dense linear with the layer's own bias."""
    for name, layer in factored.items():
        m, n = layer.out_features, layer.in_features
        dense = nn.Linear(n, m, bias=layer.bias is not None, device="meta")
        dense.weight = _weightless((m, n), layer.up.weight)
        dense.bias = layer.up.bias
        model.set_submodule(name, dense)


def _load(model: PreTrainedModel, adapter: Path, assign: bool = False) -> PeftModel:
    """Load an adapter onto a model, with PEFT.

    Raises:
        InputError: PEFT cannot read the adapter, or it does not fit the model; the message names the first tensor
            without a counterpart.
    """
    try:
        with _quiet():
            config = PeftConfig.from_pretrained(str(adapter))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{adapter}: PEFT {version('peft')} cannot read this adapter's config: {error}") from error
    config.base_model_name_or_path = None  # PEFT would warn about any difference in name
    vocabulary = _tables(model)
    try:
        with _quiet():
            loaded = get_peft_model(model, config, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=assign)
            device = str(model.device)
            result = loaded.load_adapter(str(adapter), ADAPTER_NAME, torch_device=device, low_cpu_mem_usage=assign)
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise InputError(f"{adapter} does not fit the model: {_first_mismatch(error, vocabulary)}") from error
    unexpected = [key for key in result.unexpected_keys if not is_duplicate(key)]
    if unexpected:
        raise InputError(f"{adapter} is for another base: the model has no {plain_name(unexpected[0])}")
    if missing := _missing(loaded, result.missing_keys):
        raise InputError(f"{adapter} is for another base: it has no {plain_name(missing[0])}")
    for key, tensor in get_peft_model_state_dict(loaded, adapter_name=ADAPTER_NAME).items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{adapter}: {plain_name(key)} holds NaN or Inf; the file is damaged or training diverged")
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence PEFT's warnings. Most are about tied weights, which this module handles itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _tables(model: PreTrainedModel) -> list[str]:
    """The names of the modules that have one row per token of the vocabulary."""
    try:
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
    except NotImplementedError:  # image models may have none
        return []
    return [name for name, module in model.named_modules() if any(module is table for table in tables)]


def _missing(loaded: PeftModel, keys: Sequence[str]) -> list[str]:
    """The keys that are not just another name of a tensor that was read, such as a bank that all layers share."""
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    read_ids = {id(parameter) for name, parameter in parameters.items() if name not in keys}
    return [key for key in keys if key not in parameters or id(parameters[key]) not in read_ids]


def _first_mismatch(error: Exception, vocabulary: Sequence[str]) -> str:
    """One line of PEFT's error, with advice if a module of ``vocabulary`` has the wrong size."""
    lines = [line.strip() for line in str(error).splitlines()]
    first = plain_name(next((line for line in lines if "size mismatch" in line), lines[0]))
    if "size mismatch" in first and any(f" {name}." in first for name in vocabulary):
        first += (
            " The adapter was trained with another vocabulary: give the model with its embeddings resized "
            "(resize_token_embeddings) and the adapter's tokenizer beside it"
        )
    return first


def _check_fit(skeleton: PreTrainedModel, adapter: Path, factored: Mapping[str, LowRankLinear] | None = None) -> None:
    """Load the adapter onto a skeleton, and check for what cannot be merged correctly.

    Raises:
        InputError: the adapter does not fit, or cannot be merged correctly.
    """
    _load(skeleton, adapter, assign=True)
    for name, module in skeleton.named_modules():
        if isinstance(module, LoraLayer):
            _check_lora_layer(adapter, name, module)
        elif isinstance(module, ModulesToSaveWrapper):
            replaced = [layer for layer in factored or () if f"{layer}.".startswith(f"{name}.")]
            if replaced:
                raise InputError(
                    f"{adapter} replaces {name} whole (modules_to_save), but {replaced[0]} is factored: "
                    "merge it before compression, or leave that layer dense"
                )


def _touches(info: AdapterInfo, module: str) -> bool:
    """Whether the adapter changes a module."""
    return module in info.ranks or any(name.startswith(f"{module}.") for name in info.replaced)


def _check_shared(adapter: Path, info: AdapterInfo, groups: Sequence[Sequence[str]]) -> None:
    """Check that an adapter changes no ``down`` that layers share. PEFT wraps a shared module under its first name
    only, so such an adapter works on that one layer.

    Raises:
        InputError: the adapter changes one.
    """
    for group in groups:
        for name in group:
            if _touches(info, f"{name}.down"):
                raise InputError(
                    f"{adapter} changes {name}.down for that layer alone, but {', '.join(group)} share one down: "
                    "merging would change them all. Train an adapter of the up factors or of the dense model"
                )


def _check_lora_layer(adapter: Path, name: str, lora: LoraLayer) -> None:
    if lora.lora_bias.get(ADAPTER_NAME) and lora.get_base_layer().bias is None:
        raise InputError(f"{adapter} has a LoRA bias for {name}, which has no bias to add it to")


def _merge_loaded(loaded: PeftModel, model: PreTrainedModel) -> None:
    """Merge a loaded adapter into the model, in place. Tied weights that are still equal are tied again; the others
    are untied."""
    _untie_adapted(model)
    with _quiet(), restored_ties(model.config):  # PEFT unties as soon as an adapter is on any tied weight
        loaded.merge_and_unload()
    _settle_ties(model)


def _untie_adapted(model: PreTrainedModel) -> None:
    """Give every adapted layer its own weight: PEFT merges in place, and other users of the weight must not change."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if uses[id(parameter)] > 1:
                    setattr(layer, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


@torch.no_grad()
def _settle_ties(model: PreTrainedModel) -> None:
    """Tie all weights again if every tied pair is equal, or else untie all: the config has one flag for all of them."""
    ties = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if _owner(model, target) is not _owner(model, source)  # not a whole module with two names
    }
    pairs = {target: (model.get_parameter(target), model.get_parameter(source)) for target, source in ties.items()}
    equal = all(one is other or _equal_but_for_rounding(one, other) for one, other in pairs.values())
    for target, (one, other) in pairs.items():
        if equal or one is other:
            parameter = other if equal else nn.Parameter(one.detach().clone(), one.requires_grad)
            setattr(_owner(model, target), target.rpartition(".")[2], parameter)
    if not equal:
        other_keys = model.all_tied_weights_keys.keys() - ties.keys()
        model.all_tied_weights_keys = {name: model.all_tied_weights_keys[name] for name in sorted(other_keys)}
        untie_embeddings(model.config)


def _owner(model: nn.Module, parameter: str) -> nn.Module:
    """The module that holds a parameter of this name."""
    return model.get_submodule(parameter.rpartition(".")[0])


def _equal_but_for_rounding(weight: Tensor, other: Tensor) -> bool:
    if weight.shape != other.shape:
        return False
    return bool((weight - other).abs().max() <= 4 * torch.finfo(weight.dtype).eps * other.abs().max())


@torch.no_grad()
def _answers(model: PreTrainedModel) -> Tensor:
    """The logits for a small artificial input."""
    if "pixel_values" in model.main_input_name:
        size = None if image_size(model.config) else (_IMAGE_SIDE, _IMAGE_SIDE)
        pixels = image_inputs(model, size).tensors["pixel_values"]
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
        return model(pixel_values=noise.to(pixels)).logits.float()
    table: Any = model.get_input_embeddings()
    rows = table.weight.shape[0]
    ids = (torch.arange(1, 7, device=model.device) % rows)[None]
    if end_ids := [token for token in end_tokens(model.config) if 0 <= token < rows]:
        ids[:, -1] = end_ids[0]  # some classifiers search for it
    return model(input_ids=ids).logits.float()


def _groups(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of the two-factor layers, grouped by shared ``down``."""
    shared = shared_groups(model)
    grouped = {name for group in shared for name in group}
    return shared + [(name,) for name in low_rank_layers(model) if name not in grouped]


def _pair(lora: nn.Module, layer: LowRankLinear) -> Factors:
    """The factors that an adapter adds to a layer's product, and in ``bias`` what it adds to its bias; rank 0 without
    an adapter."""
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
    """The new factors of one layer, or of layers that share ``down``; their ``bias`` is what to add to the biases."""
    first, C = layers[0], metrics[0][0]
    sizes = [layer.out_features for layer in layers]
    ups = torch.cat([layer.up.weight.double() for layer in layers])
    added_ups = torch.block_diag(*(pair.up.double() for pair in pairs))
    downs = [first.down.weight.double(), *(pair.down.double() for pair in pairs)]
    full = Factors(torch.cat([ups, added_ups], dim=1), torch.cat(downs))
    cut = retruncate(full, first.rank, C, _blocks([G for _, G in metrics], sizes))
    dtype = first.up.weight.dtype
    down = cut.down.to(dtype)
    factors, reports = [], []
    rows = zip(full.up.split(sizes), cut.up.split(sizes), pairs, metrics, strict=True)
    for full_up, up, pair, (_, G) in rows:
        factors.append(Factors(up.to(dtype), down, pair.bias))
        error = relative_error(Factors(full_up, full.down), factors[-1], C, G)
        reports.append(MergedLayer(error, exact=error <= 4 * torch.finfo(dtype).eps))
    return factors, reports


def _blocks(metrics: Sequence[Tensor | None], sizes: Sequence[int]) -> list[Tensor] | None:
    """The output metrics of stacked layers, with identity matrices in place of None; None if all are None."""
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
def _restored_flags(model: PreTrainedModel) -> Iterator[None]:
    """Restore gradient flags and training mode at the end: PEFT freezes the base model and sets it to eval mode."""
    training = model.training
    trainable = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    yield
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trainable[name])
    model.train(training)
