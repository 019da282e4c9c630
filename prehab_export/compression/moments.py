"""Holds the input and gradient moments of a model's layers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from prehab_export.linalg import Sampling

# A variance below this share of the mean square is the rounding, of either sign, of a constant in float32.
CONSTANT = 4 * torch.finfo(torch.float32).eps


def centred(second_moment: Tensor, mean: Tensor) -> Tensor:
    """Return E[x xᵀ] − μ μᵀ (n×n) in float64, with 0 in rows and columns of features that are constant in float32."""
    second, mean = second_moment.double(), mean.double()
    covariance = second - torch.outer(mean, mean)
    varies = covariance.diagonal() > CONSTANT * second.diagonal()
    return covariance * varies * varies[:, None]


Value = TypeVar("Value")


class Lookup(Mapping[str, Value], Generic[Value]):
    """A mapping whose values are fetched on every access and not kept; they may be larger than memory together."""

    def __init__(self, names: Iterable[str], fetch: Callable[[str], Value]) -> None:
        self._names, self._fetch = dict.fromkeys(names), fetch

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        return self._fetch(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class InputMoment:
    """Moments of one input.

    second_moment: E[x xᵀ] (n×n).
    mean: E[x] (n).
    tokens: number of valid positions averaged over.
    sampling: sampling error of the *centred* moment; the mean needs far fewer tokens.
    """

    second_moment: Tensor
    mean: Tensor
    tokens: int
    sampling: Sampling

    def to(self, device: torch.device) -> "InputMoment":
        """Return the same moments on this device."""
        return replace(self, second_moment=self.second_moment.to(device), mean=self.mean.to(device))

    def centred(self) -> Tensor:
        """Return the covariance E[x xᵀ] − μ μᵀ in float64, which is the metric if a bias can absorb the mean error."""
        return centred(self.second_moment, self.mean)


@dataclass(frozen=True)
class Statistics:
    """Moments of every selected layer.

    inputs: input group → moments; layers that read the same tensor share one entry.
    groups: layer name → input group (named after its first layer).
    gradients: layer name → G = E[Σ g gᵀ] (m×m), with g the gradient of one unit's loss; empty if not gathered.
    units: number of units (samples, or predicted tokens) that the gradients were averaged over.
    gradient_sampling: layer name → sampling error of its G.
    labels: where the labels for the gradients came from, ``data`` or ``model`` (see `calibrate`).
    """

    inputs: Mapping[str, InputMoment]
    groups: dict[str, str]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    units: int = 0
    gradient_sampling: dict[str, Sampling] = field(default_factory=dict)
    labels: str = "data"

    @property
    def device(self) -> torch.device:
        """The device that holds the moments."""
        return next(iter(self.inputs.values())).second_moment.device

    def input_of(self, layer: str) -> InputMoment:
        """Return the moments of a layer's input."""
        return self.inputs[self.groups[layer]]

    @classmethod
    def joined(cls, parts: Iterable["Statistics"], layers: Iterable[str]) -> "Statistics":
        """Return the moments of several parts of a model as one, in the order of these layers."""
        names, groups, inputs = list(layers), dict[str, str](), dict[str, Statistics]()
        gradients, sampling, units = dict[str, Statistics](), dict[str, Sampling](), 0
        for part in parts:
            groups |= part.groups
            inputs |= dict.fromkeys(part.inputs, part)
            gradients |= dict.fromkeys(part.gradients, part)
            sampling |= part.gradient_sampling
            units = max(units, part.units)
        return cls(
            Lookup(dict.fromkeys(groups[name] for name in names), lambda group: inputs[group].inputs[group]),
            {name: groups[name] for name in names},
            Lookup((name for name in names if name in gradients), lambda name: gradients[name].gradients[name]),
            units,
            {name: sampling[name] for name in names if name in sampling},
        )

    def blended(self, fresh: "Statistics", share: float) -> "Statistics":
        """Return ``(1 − share)·self + share·fresh`` for every moment: a running average over a changing model.

        Token counts and sampling errors stay those of ``self``.
        """
        inputs = {name: _blend_inputs(old, fresh.inputs[name], share) for name, old in self.inputs.items()}
        gradients = {name: old.lerp(fresh.gradients[name], share) for name, old in self.gradients.items()}
        return replace(self, inputs=inputs, gradients=gradients)

    def overflows(self) -> list[tuple[str, str]]:
        """Return what holds NaN or Inf, as pairs (``input`` or ``output gradient``, layer); inputs come first."""
        inputs = [
            ("input", group)
            for group, moment in self.inputs.items()
            if not (moment.second_moment.isfinite().all() and moment.mean.isfinite().all())
        ]
        return inputs + [
            ("output gradient", name) for name, gradient in self.gradients.items() if not gradient.isfinite().all()
        ]


def _blend_inputs(old: InputMoment, fresh: InputMoment, share: float) -> InputMoment:
    return InputMoment(
        old.second_moment.lerp(fresh.second_moment, share),
        old.mean.lerp(fresh.mean, share),
        old.tokens,
        old.sampling,
    )


def moments_size(shapes: Iterable[tuple[int, int]], gradients: bool) -> int:
    """Return the largest number of bytes that the moments of layers of these shapes (m×n) can take."""
    return sum(4 * (n * n + (m * m if gradients else 0)) for m, n in shapes)
