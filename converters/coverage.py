"""How much of a model its targeted layers hold, and where the rest lies.

A share is of parameters: numbers in weights, each counted once however many modules hold it; buffers do not count. Of
a targeted layer its matrix counts (of a two-factor layer both factors), not its bias, which truncation keeps.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from converters.lowrank import DenseLinear, LowRankLinear
from converters.model_config import expert_counts

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# Kind → what can be done about it, in a sentence's end.
KINDS = {
    "experts": "experts held in one parameter, not in linear layers, are not compressed yet",
    "stacked": "matrices stacked in one parameter are not compressed",
    "embedding": "embedding tables stay dense; --quantize int8-tables4 makes them small in the graph",
    "convolution": "convolutions are not compressed",
    "linear": "other linear layers can be named with --include, unless their weight is tied to another",
    "other": "parameters of other kinds are not compressed",
}
# Groups of the rest that are worth a name: so many, and of at least this share.
NAMED, LEAST_NAMED = 3, 0.01
# Below this share of the whole, a warning; below that one, a run is refused unless layers were named.
USUAL_SHARE, LEAST_SHARE = 0.5, 0.1


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one place in every block: ``model.layers.*.mlp.experts.gate_up_proj``.

    kind: a key of ``KINDS``. share: of the whole model's parameters.
    """

    name: str
    kind: str
    parameters: int
    share: float


@dataclass(frozen=True)
class Coverage:
    """Parameters of the targeted layers and of the whole model; ``rest``: all others, the largest group first."""

    targeted: int
    total: int
    rest: tuple[ParameterGroup, ...]

    @property
    def share(self) -> float:
        return self.targeted / self.total

    def facts(self) -> dict[str, Any]:
        """As JSON types, with the groups that are worth a name."""
        return {
            "targeted_parameters": self.targeted,
            "total_parameters": self.total,
            "targeted_share": self.share,
            "rest": [asdict(group) for group in self._named],
        }

    def sentence(self) -> str:
        return (
            f"{_percent(self.share)} of the model's parameters lie in the layers to compress "
            f"({self.targeted:,} of {self.total:,})"
        )

    def where_the_rest_lies(self) -> str:
        """The largest groups beside the targeted layers, and what can be done about them."""
        names = ", ".join(f"{_percent(group.share)} in {group.name} ({group.kind})" for group in self._named)
        advice = "; ".join(KINDS[kind] for kind in dict.fromkeys(group.kind for group in self._named))
        return f"{names}; {advice}"

    @property
    def warning(self) -> str | None:
        """What to say where most of the model stays as it is."""
        if self.share >= USUAL_SHARE:
            return None
        return f"only {self.sentence()}. The rest: {self.where_the_rest_lies()}"

    @property
    def _named(self) -> tuple[ParameterGroup, ...]:
        return tuple(group for at, group in enumerate(self.rest[:NAMED]) if not at or group.share >= LEAST_NAMED)


def coverage(model: nn.Module, layers: Mapping[str, nn.Module]) -> Coverage:
    """What ``layers``, dense or of two factors, hold of ``model``; weights may be on the meta device."""
    targeted = {id(weight): weight for layer in layers.values() for weight in _matrices(layer)}
    total = sum(parameter.numel() for parameter in model.parameters())
    config = getattr(model, "config", None)
    experts = frozenset() if config is None else expert_counts(config)
    seen, sizes = set(targeted), dict[str, tuple[str, int]]()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                place = re.sub(r"(?<=\.)\d+(?=\.)", "*", f"{prefix}.{name}".removeprefix("."))
                _, size = sizes.get(place, ("", 0))
                sizes[place] = _kind(place, module, parameter, experts), size + parameter.numel()
    groups = (ParameterGroup(place, kind, size, size / total) for place, (kind, size) in sizes.items())
    rest = tuple(sorted(groups, key=lambda group: -group.parameters))
    return Coverage(sum(weight.numel() for weight in targeted.values()), total, rest)


def _matrices(layer: nn.Module) -> list[Tensor]:
    if isinstance(layer, LowRankLinear):
        return [layer.up.weight, layer.down.weight]
    assert isinstance(layer, DenseLinear), f"not a linear: {type(layer).__name__}"
    return [layer.weight]


def _kind(place: str, module: nn.Module, parameter: Tensor, experts: Set[Any]) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, CONVOLUTIONS):
        return "convolution"
    if isinstance(module, DenseLinear) and parameter.dim() == 2:
        return "linear"
    # A table of positions has three dimensions too, the first of them 1.
    stacked = parameter.dim() == 3 and parameter.shape[0] > 1
    if "expert" in place or (stacked and parameter.shape[0] in experts):
        return "experts"
    return "stacked" if stacked else "other"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
