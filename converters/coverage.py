"""Measure which share of a model's parameters the layers to compress hold, and find where the rest is.

Parameters are numbers in weights. Each weight counts once, however many modules hold it; buffers do not count. For a
layer to compress, its matrix counts (both factors of a two-factor layer), but not its bias, which truncation keeps.
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
# Kind of parameter → what can be done about it, as the end of a sentence.
KINDS = {
    "experts": "experts held in one parameter, not in linear layers, are not compressed yet",
    "stacked": "matrices stacked in one parameter are not compressed",
    "embedding": "embedding tables stay dense; --quantize int8-tables4 makes them small in the graph",
    "convolution": "convolutions are not compressed",
    "linear": "other linear layers can be named with --include, unless their weight is tied to another",
    "other": "parameters of other kinds are not compressed",
}
# How many groups of the rest are named at most, and the share that all but the largest of them must have.
NAMED, LEAST_NAMED = 3, 0.01
# A coverage below the first share gives a warning. Below the second, a run is refused unless it names its layers.
USUAL_SHARE, LEAST_SHARE = 0.5, 0.1


@dataclass(frozen=True)
class ParameterGroup:
    """The parameters at one place in all blocks, such as ``model.layers.*.mlp.experts.gate_up_proj``.

    kind: a key of ``KINDS``.
    share: share of all parameters of the model.
    """

    name: str
    kind: str
    parameters: int
    share: float


@dataclass(frozen=True)
class Coverage:
    """How many parameters the layers to compress and the whole model have.

    rest: the parameters outside the layers to compress, largest group first.
    """

    selected: int
    total: int
    rest: tuple[ParameterGroup, ...]

    @property
    def share(self) -> float:
        """The share of parameters in the layers to compress."""
        return self.selected / self.total

    def facts(self) -> dict[str, Any]:
        """Return the coverage in JSON types, with the groups that are large enough to name."""
        return {
            "selected_parameters": self.selected,
            "total_parameters": self.total,
            "selected_share": self.share,
            "rest": [asdict(group) for group in self._named],
        }

    def sentence(self) -> str:
        """State the share in words, without a full stop."""
        return (
            f"{_percent(self.share)} of the model's parameters are in the layers to compress "
            f"({self.selected:,} of {self.total:,})"
        )

    def where_the_rest_lies(self) -> str:
        """Name the largest groups outside the layers to compress, and what can be done about them."""
        names = ", ".join(f"{_percent(group.share)} in {group.name} ({group.kind})" for group in self._named)
        advice = "; ".join(KINDS[kind] for kind in dict.fromkeys(group.kind for group in self._named))
        return f"{names}; {advice}"

    @property
    def warning(self) -> str | None:
        """A warning if most of the model is not compressed; else None."""
        if self.share >= USUAL_SHARE:
            return None
        return f"only {self.sentence()}. The rest: {self.where_the_rest_lies()}"

    @property
    def _named(self) -> tuple[ParameterGroup, ...]:
        """The groups that are large enough to name; the largest always is."""
        largest = enumerate(self.rest[:NAMED])
        return tuple(group for index, group in largest if not index or group.share >= LEAST_NAMED)


def coverage(model: nn.Module, layers: Mapping[str, nn.Module]) -> Coverage:
    """Compute which part of ``model`` is in ``layers``, dense or of two factors; weights may be on the meta device."""
    selected = {id(weight): weight for layer in layers.values() for weight in _matrices(layer)}
    total = sum(parameter.numel() for parameter in model.parameters())
    config = getattr(model, "config", None)
    experts = frozenset() if config is None else expert_counts(config)
    counted, sizes = set(selected), dict[str, tuple[str, int]]()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in counted:
                counted.add(id(parameter))
                place = re.sub(r"(?<=\.)\d+(?=\.)", "*", f"{prefix}.{name}".removeprefix("."))
                _, size = sizes.get(place, ("", 0))
                sizes[place] = _kind(place, module, parameter, experts), size + parameter.numel()
    groups = (ParameterGroup(place, kind, size, size / total) for place, (kind, size) in sizes.items())
    rest = tuple(sorted(groups, key=lambda group: -group.parameters))
    return Coverage(sum(weight.numel() for weight in selected.values()), total, rest)


def _matrices(layer: nn.Module) -> list[Tensor]:
    """The weights of a layer that count as its parameters."""
    if isinstance(layer, LowRankLinear):
        return [layer.up.weight, layer.down.weight]
    assert isinstance(layer, DenseLinear), f"not a linear: {type(layer).__name__}"
    return [layer.weight]


def _kind(place: str, module: nn.Module, parameter: Tensor, experts: Set[Any]) -> str:
    """The key of ``KINDS`` for a parameter; ``experts`` are the numbers of experts that the config states."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, CONVOLUTIONS):
        return "convolution"
    if isinstance(module, DenseLinear) and parameter.dim() == 2:
        return "linear"
    # A table of positions also has three dimensions, but the first of them is 1.
    stacked = parameter.dim() == 3 and parameter.shape[0] > 1
    if "expert" in place or (stacked and parameter.shape[0] in experts):
        return "experts"
    return "stacked" if stacked else "other"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
