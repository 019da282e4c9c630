"""Cache the latents of low-rank key and value projections instead of keys and values.

With ``k = up(down(x))``, the latent ``down(x)``, of width r, is all that needs to be cached for a token. If keys and
values share one ``down``, one latent serves both.

- Values are never rebuilt: attention mixes the latents, and ``up`` is applied to the mixture: P (Z Uᵀ) = (P Z) Uᵀ
  (as in multi-head latent attention, arXiv 2405.04434, §2.1).
- Keys are not rebuilt either if nothing happens between projection and cache: q (Z Uᵀ)ᵀ = (q U) Zᵀ. A bias adds the
  same value to all scores of a query, which the softmax ignores.
- Keys that are normalised or rotated are rebuilt for the whole past in every step, from the latents and a table of the
  past tokens' angles, which all layers share. This takes time that grows with the past.

What a model does between projection and cache is not read from its code. Instead, guesses are compared with the keys
and values that the model really passes to its cache. If no guess fits, keys or values are cached directly.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from converters.lowrank import LowRankLinear, low_rank_layers
from converters.model_config import vocabulary_size
from converters.onnx.attention import PLAIN_ATTENTION, additive_mask, attention_implementation, refuse
from converters.onnx.cache import CacheLayout
from converters.onnx.modes import FULL, LATENT, LATENT_VALUES

# The name under which transformers finds the attention over latents.
ATTENTION = "latent"


@dataclass(frozen=True)
class Projection:
    """How a low-rank layer produces the keys, or the values, that are cached.

    A layer that produces queries, keys and values at once is not supported: a part of it would have to be stored twice.

    layer: the two-factor layer.
    heads, width: the number of heads, and the width of each.
    norm: the norm between the layer and the cache, if there is one.
    rotated: whether a rotary embedding is applied before the cache.
    """

    layer: LowRankLinear
    heads: int
    width: int
    norm: nn.Module | None = None
    rotated: bool = False

    @property
    def plain(self) -> bool:
        """Whether only ``up`` is between latents and cache, so that it can be applied on the other side of attention's
        products."""
        return self.norm is None and not self.rotated

    def by_head(self) -> Tensor:
        """Return the weight of ``up`` as (heads, width, rank)."""
        return self.layer.up.weight.reshape(self.heads, self.width, -1)

    def bias_by_head(self) -> Tensor | None:
        """Return the bias of ``up`` as (heads, 1, width)."""
        bias = self.layer.up.bias
        return None if bias is None else bias.reshape(self.heads, 1, self.width)

    def rebuild(self, latents: Tensor, angles: Tensor | None) -> Tensor:
        """Compute keys or values from latents: latents (B, 1, T, rank), angles (B, 1, T, rotated width) → (B, heads, T,
        width)."""
        states = nn.functional.linear(latents.squeeze(1), self.layer.up.weight, self.layer.up.bias)
        if self.norm is not None and _size(self.norm) != self.width:
            states = self.norm.forward(states)  # without hooks, which are for the model's own calls
        states = states.unflatten(-1, (self.heads, self.width))
        if self.norm is not None and _size(self.norm) == self.width:
            states = self.norm.forward(states)
        states = states.transpose(1, 2)
        return rotate(states, angles) if self.rotated and angles is not None else states


@dataclass(frozen=True)
class LayerPlan:
    """How one layer of the cache is stored.

    module: the attention module.
    shapes: (heads, width) of the keys, and of the values.
    key, value: the projection whose latents are cached; None to cache keys, or values, directly.
    shared: whether one latent serves both.
    """

    module: nn.Module
    shapes: tuple[tuple[int, int], tuple[int, int]]
    key: Projection | None
    value: Projection | None
    shared: bool

    @property
    def mixes_latents(self) -> bool:
        """Whether attention itself works on latents; rebuilt keys are ordinary keys."""
        return self.value is not None or (self.key is not None and self.key.plain)

    def past(self, index: int) -> dict[str, tuple[int, int]]:
        """Return (heads, width) of this layer's cache inputs, by name; ``index`` is the number of the layer."""
        name = f"past_key_values.{index}"
        if self.shared and self.key is not None:
            return {f"{name}.latent": (1, self.key.layer.rank)}
        parts = zip(("key", "value"), (self.key, self.value), self.shapes, strict=True)
        return {
            f"{name}.{part}" if projection is None else f"{name}.{part}_latent": shape
            if projection is None
            else (1, projection.layer.rank)
            for part, projection, shape in parts
        }


class LatentLayout(CacheLayout):
    """A cache with latents in at least one layer.

    Cache inputs are ``past_key_values.{i}.latent`` (B, 1, P, rank) for keys and values together, or ``.key_latent`` and
    ``.value_latent``; ``.key`` and ``.value`` if those are cached directly; and, if keys are rotated,
    ``past_key_values.angles`` (B, 1, P, rotated width), with the cosines and then the sines of half the width.
    """

    def __init__(self, plans: Sequence[LayerPlan], rotated_width: int, dtype: torch.dtype) -> None:
        past = {name: shape for index, plan in enumerate(plans) for name, shape in plan.past(index).items()}
        self.plans = list(plans)
        self.rotates = any(plan.key is not None and plan.key.rotated for plan in plans)
        if self.rotates:
            past["past_key_values.angles"] = (1, rotated_width)
        super().__init__(past, dtype)

    def run(self, model: PreTrainedModel, inputs: dict[str, Tensor], past: Sequence[Tensor]) -> tuple[Tensor, ...]:
        tensors = list(past)
        past_angles = tensors.pop() if self.rotates else None
        layers = [part.layer for plan in self.plans for part in (plan.key, plan.value) if part is not None]
        with _Watch([plan.module for plan in self.plans], layers) as watch:
            latent_layers = []
            for plan in self.plans:
                layer_past = [tensors.pop(0) for _ in range(1 if plan.shared else 2)]
                latent_layers.append(_LatentLayer(plan, layer_past, watch, past_angles))
            cache = DynamicCache()
            cache.layers = list(latent_layers)
            output: Any = model(**inputs, past_key_values=cache, use_cache=True)
            angles = [watch.angles_after(past_angles)] if self.rotates else []
        return (output.logits, *(tensor for layer in latent_layers for tensor in layer.cached), *angles)

    @property
    def mixes_latents(self) -> bool:
        return any(plan.mixes_latents for plan in self.plans)

    @contextmanager
    def attention(self, base: str) -> Iterator[str]:
        """Register attention over latents for the layers that have latents, and ``base`` for the others; yields its
        name."""
        by_module = {_identity(plan.module): plan for plan in self.plans}

        def attend(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, None]:
            plan = by_module[_identity(module)]
            if base != PLAIN_ATTENTION and not plan.mixes_latents:
                return AttentionInterface()[base](module, *args, **options)
            return latent_attention(plan, *args, **options), None

        AttentionInterface.register(ATTENTION, attend)
        AttentionMaskInterface.register(ATTENTION, additive_mask)
        yield ATTENTION


def latent_layout(model: PreTrainedModel, full: CacheLayout, kind: str) -> tuple[CacheLayout, list[str]]:
    """Choose the layout for a kind of cache.

    A latent is only used if it is narrower than the keys or values that it replaces.

    Args:
        full: the layout with keys and values.
        kind: one of `converters.onnx.modes.KV_CACHES`.

    Returns:
        The layout, and a warning for each group of layers that does not support this kind.
    """
    if kind == FULL:
        return full, []
    ids = torch.arange(1, 7, device=model.device).reshape(2, 3) % (vocabulary_size(model.config) or 1)
    plans, width = _plans(model, ids, kind)
    warnings = []
    for part in ("value",) if kind == LATENT_VALUES else ("key", "value"):
        count = sum(getattr(plan, part) is None for plan in plans)
        if count:
            warnings.append(
                f"{part}s of {count} of {len(plans)} layers are cached as they are: their projections are dense, "
                f"combined with that of the queries, no narrower than the {part}s, or followed by more than a norm and "
                "a rotation"
            )
    if not any(plan.key or plan.value for plan in plans):
        return full, warnings
    layout = LatentLayout(plans, width, full.dtype)
    if reason := _why_unfit(model, layout, ids):
        return full, [f"keys and values are cached as they are: {reason}"]
    return layout, warnings


def kind_of_cache(inputs: Iterable[str]) -> str:
    """Return the kind of cache (one of `converters.onnx.modes.KV_CACHES`) of a graph with these inputs.

    >>> kind_of_cache(["input_ids", "past_key_values.0.key", "past_key_values.0.value_latent"])
    'latent-values'
    """
    suffixes = {name.rpartition(".")[2] for name in inputs if name.startswith("past_key_values.")}
    if suffixes & {"latent", "key_latent"}:
        return LATENT
    return LATENT_VALUES if "value_latent" in suffixes else FULL


@torch.no_grad()
def _why_unfit(model: PreTrainedModel, layout: LatentLayout, ids: Tensor) -> str | None:
    """Why the model's answers with this cache differ from those without one; None if they are equal."""
    empty = [torch.zeros(len(ids), heads, 0, width, dtype=layout.dtype) for heads, width in layout.past.values()]
    expected = model(input_ids=ids, use_cache=False).logits
    try:
        with layout.attention(PLAIN_ATTENTION) as name, attention_implementation(model, name):
            actual = layout.run(model, {"input_ids": ids}, [tensor.to(model.device) for tensor in empty])[0]
    except NotImplementedError as error:
        return f"attention over latents does not support {error}"
    except RuntimeError:
        return "the model does not take its attention from transformers' registry"
    if (actual - expected).abs().max() > _tolerance(expected.dtype) * expected.abs().max():
        return "the model's answers would differ"
    return None


def latent_attention(
    plan: LayerPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """Compute attention over keys and values, or over latents in place of either.

    Args:
        query: (B, H, S, d).
        key: keys (B, H_kv, T, d), or latents (B, 1, T, r).
        value: values (B, H_kv, T, d), or latents (B, 1, T, r).
        mask: additive, (B, 1, S, T).

    Returns:
        (B, S, H, d).

    Raises:
        NotImplementedError: the model uses more than a scale, a mask and a soft cap.
    """
    refuse(options)
    heads, width = query.shape[1], query.shape[3]
    (groups, _), _ = plan.shapes
    rows = query.reshape(query.shape[0], groups, -1, width)  # the queries of a group's heads, one head after another
    if plan.key is not None and plan.key.plain:
        rows = (rows @ plan.key.by_head()).flatten(1, 2).unsqueeze(1)
    scores = (rows @ key.transpose(2, 3)).reshape(query.shape[0], heads, -1, key.shape[2])
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if plan.value is None:
        mixed = shares.reshape(query.shape[0], groups, -1, key.shape[2]) @ value
    else:
        latents = shares.reshape(query.shape[0], 1, -1, key.shape[2]) @ value
        mixed = latents.reshape(query.shape[0], groups, -1, value.shape[3]) @ plan.value.by_head().transpose(1, 2)
        bias = plan.value.bias_by_head()
        mixed = mixed if bias is None else mixed + bias
    return mixed.reshape(query.shape[0], heads, -1, mixed.shape[3]).transpose(1, 2).contiguous()


def rotate(states: Tensor, angles: Tensor) -> Tensor:
    """Apply a rotary embedding (arXiv 2104.09864) by halves.

    Args:
        states: (B, heads, T, width); the first ``2h`` of the width are rotated.
        angles: (B, 1, T, 2h), h cosines and h sines.
    """
    half = angles.shape[-1] // 2
    cosine, sine = angles[..., :half], angles[..., half:]
    first, second, rest = states[..., :half], states[..., half : 2 * half], states[..., 2 * half :]
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return torch.cat([*rotated, rest] if rest.shape[-1] else rotated, dim=-1)


class _Watch:
    """Records one run of a model: the output of ``down`` per low-rank layer, and cosines and sines per module."""

    def __init__(self, modules: Iterable[nn.Module], layers: Iterable[LowRankLinear]) -> None:
        self._modules, self._layers = list(modules), list(layers)
        self._stack = ExitStack()
        self.latents: dict[int, Tensor] = {}
        self.angles: dict[int, Tensor] = {}
        self._table: Tensor | None = None

    def __enter__(self) -> "_Watch":
        for module in self._modules:
            handle = module.register_forward_pre_hook(self._note_angles, with_kwargs=True)
            self._stack.callback(handle.remove)
        for layer in self._layers:
            # Recorded by layer, not by ``down``: during tracing, a shared module is a different object in each layer.
            note = partial(self._note_latents, _identity(layer))
            self._stack.callback(layer.down.register_forward_hook(note).remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def latents_of(self, projection: Projection) -> Tensor:
        """Return the latents of the new tokens, (B, 1, S, rank)."""
        return self.latents[_identity(projection.layer)].unsqueeze(1)

    def angles_after(self, past: Tensor | None) -> Tensor:
        """Return the angles of all tokens, past ones first; the same tensor for every layer of a run."""
        if self._table is None:
            new = next(iter(self.angles.values()))
            self._table = new if past is None else torch.cat([past, new.expand(past.shape[0], -1, -1, -1)], dim=2)
        return self._table

    def _note_latents(self, layer: int, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.latents[layer] = output

    def _note_angles(self, module: nn.Module, args: Any, options: dict[str, Any]) -> None:
        tables = options.get("position_embeddings")
        if isinstance(tables, tuple) and len(tables) == 2 and all(isinstance(table, Tensor) for table in tables):
            cosine, sine = tables
            half = cosine.shape[-1] // 2
            self.angles[_identity(module)] = torch.cat([cosine[..., :half], sine[..., :half]], dim=-1).unsqueeze(1)


class _LatentLayer(DynamicLayer):
    """A cache layer that gets keys and values, caches latents instead as planned, and returns what `latent_attention`
    takes."""

    def __init__(self, plan: LayerPlan, past: list[Tensor], watch: _Watch, past_angles: Tensor | None) -> None:
        super().__init__()
        self.plan, self.cached, self.watch, self.past_angles = plan, past, watch, past_angles
        self.keys, self.values, self.is_initialized = past[0], past[-1], True  # transformers reads the past length here

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = [
            states if projection is None else self.watch.latents_of(projection)
            for states, projection in ((key_states, self.plan.key), (value_states, self.plan.value))
        ][: len(self.cached)]
        self.cached = [torch.cat([past, added], dim=2) for past, added in zip(self.cached, new, strict=True)]
        key, value = self.cached[0], self.cached[-1]
        if self.plan.key is not None and not self.plan.key.plain:
            angles = self.watch.angles_after(self.past_angles) if self.plan.key.rotated else None
            key = self.plan.key.rebuild(key, angles)
        return key, value


class _Recorder(DynamicCache):
    """A cache that records which module passes which keys and values to every layer."""

    def __init__(self, running: list[nn.Module]) -> None:
        super().__init__()
        self.running = running
        self.updates: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.updates[layer_idx] = (self.running[-1], key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def _plans(model: PreTrainedModel, ids: Tensor, kind: str) -> tuple[list[LayerPlan], int]:
    """The plan of every layer of the cache, and the rotated width."""
    running: list[nn.Module] = []
    with ExitStack() as stack, _Watch(model.modules(), low_rank_layers(model).values()) as watch:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(lambda module, _: running.append(module)).remove)
            stack.callback(module.register_forward_hook(lambda *_: running.pop() and None).remove)
        recorder = _Recorder(running)
        model(input_ids=ids, past_key_values=recorder, use_cache=True)
    table = next(iter(watch.angles.values()), None)
    plans = []
    for _, (module, keys, values) in sorted(recorder.updates.items()):
        # Layers with other angles than the first (local against global layers) will not fit the one table.
        angles = table if _identity(module) in watch.angles else None
        find = partial(_projection, module, watch)
        key = find(keys, angles) if kind == LATENT else None
        value = find(values, None)
        value = value if value is not None and value.plain else None
        shapes = ((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3]))
        plans.append(_worthwhile(module, shapes, key, value))
    return plans, 0 if table is None else table.shape[-1]


def _projection(module: nn.Module, watch: _Watch, states: Tensor, angles: Tensor | None) -> Projection | None:
    """The projection that produces these states (B, heads, S, width) from the recorded latents; None if none does."""
    heads, width = states.shape[1], states.shape[3]
    norms = [None, *(child for name, child in module.named_children() if name.startswith("k_") and "norm" in name)]
    for layer in module.children():
        if not isinstance(layer, LowRankLinear) or layer.out_features != heads * width:
            continue
        if _identity(layer) not in watch.latents:
            continue
        for norm, rotated in product(norms, (False, True) if angles is not None else (False,)):
            guess = Projection(layer, heads, width, norm, rotated)
            rebuilt = guess.rebuild(watch.latents_of(guess), angles)
            bound = _tolerance(states.dtype) * states.abs().max()
            if rebuilt.shape == states.shape and (rebuilt - states).abs().max() <= bound:
                return guess
    return None


def _worthwhile(
    module: nn.Module, shapes: tuple[tuple[int, int], tuple[int, int]], key: Projection | None, value: Projection | None
) -> LayerPlan:
    """A plan without the latents that are no narrower than the keys or values that they replace."""
    sizes = [heads * width for heads, width in shapes]
    if key is not None and value is not None and key.layer.down is value.layer.down and key.layer.rank < sum(sizes):
        return LayerPlan(module, shapes, key, value, shared=True)
    key = key if key is not None and key.layer.rank < sizes[0] else None
    value = value if value is not None and value.layer.rank < sizes[1] else None
    return LayerPlan(module, shapes, key, value, shared=False)


def _identity(module: nn.Module) -> int:
    """An id of the module that its stand-in has, too: during tracing, another object shares the module's attributes."""
    return id(vars(module))


def _tolerance(dtype: torch.dtype) -> float:
    """The largest difference between two computations of the same numbers, relative to the largest number."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 3e-2


def _size(norm: nn.Module) -> int:
    """The width that a norm works on; 0 if it has no weight."""
    weight = getattr(norm, "weight", None)
    return weight.shape[-1] if isinstance(weight, Tensor) else 0
