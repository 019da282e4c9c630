"""Holds the input and gradient moments of a model's layers, and saves them as safetensors."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from converters.errors import InputError
from prehab_export.linalg import Sampling

# A variance below this share of the mean square is the rounding, of either sign, of a constant in float32.
CONSTANT = 4 * torch.finfo(torch.float32).eps


def centred(second_moment: Tensor, mean: Tensor) -> Tensor:
    """Return E[x xᵀ] − μ μᵀ (n×n) in float64, with 0 in rows and columns of features that are constant in float32."""
    second, mean = second_moment.double(), mean.double()
    covariance = second - torch.outer(mean, mean)
    varies = covariance.diagonal() > CONSTANT * second.diagonal()
    return covariance * varies * varies[:, None]


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

    inputs: dict[str, InputMoment]
    groups: dict[str, str]
    gradients: dict[str, Tensor] = field(default_factory=dict)
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
        held = list(parts)
        groups = {name: group for part in held for name, group in part.groups.items()}
        inputs = {group: moment for part in held for group, moment in part.inputs.items()}
        gradients = {name: gradient for part in held for name, gradient in part.gradients.items()}
        sampling = {name: values for part in held for name, values in part.gradient_sampling.items()}
        names = list(layers)
        return cls(
            {group: inputs[group] for group in dict.fromkeys(groups[name] for name in names)},
            {name: groups[name] for name in names},
            {name: gradients[name] for name in names if name in gradients},
            max(part.units for part in held),
            {name: sampling[name] for name in names if name in sampling},
        )

    def blended(self, fresh: "Statistics", share: float) -> "Statistics":
        """Return ``(1 − share)·self + share·fresh`` for every moment: a running average over a changing model.

        Token counts and sampling errors stay those of ``self``.
        """
        inputs = {name: _blend_inputs(old, fresh.inputs[name], share) for name, old in self.inputs.items()}
        gradients = {name: old.lerp(fresh.gradients[name], share) for name, old in self.gradients.items()}
        return replace(self, inputs=inputs, gradients=gradients)

    def check_finite(self) -> None:
        """Check that all moments are finite.

        Raises:
            InputError: a moment holds NaN or Inf; the message names the layer.
        """
        for group, moment in self.inputs.items():
            if not (moment.second_moment.isfinite().all() and moment.mean.isfinite().all()):
                raise InputError(f"the input of {group} holds NaN or Inf on the calibration data; {_ADVICE}")
        for layer, gradient in self.gradients.items():
            if not gradient.isfinite().all():
                raise InputError(f"the output gradient of {layer} holds NaN or Inf on the calibration data; {_ADVICE}")


def _blend_inputs(old: InputMoment, fresh: InputMoment, share: float) -> InputMoment:
    return InputMoment(
        old.second_moment.lerp(fresh.second_moment, share),
        old.mean.lerp(fresh.mean, share),
        old.tokens,
        old.sampling,
    )


_ADVICE = "check the data and the model before compressing; float16 overflows where bfloat16 and float32 do not"


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Write the moments as one safetensors file, with counts and groups in its metadata."""
    tensors = {f"gradient/{name}": tensor for name, tensor in statistics.gradients.items()}
    for name, moment in statistics.inputs.items():
        tensors[f"input/{name}"] = moment.second_moment
        tensors[f"mean/{name}"] = moment.mean
    facts = {
        "groups": statistics.groups,
        "tokens": {name: moment.tokens for name, moment in statistics.inputs.items()},
        "units": statistics.units,
        "labels": statistics.labels,
        "input_sampling": {name: asdict(moment.sampling) for name, moment in statistics.inputs.items()},
        "gradient_sampling": {name: asdict(sampling) for name, sampling in statistics.gradient_sampling.items()},
    }
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, path, metadata={"statistics": json.dumps(facts)})


def moments_size(shapes: Iterable[tuple[int, int]], gradients: bool) -> int:
    """Return the largest number of bytes that the moments of layers of these shapes (m×n) can take."""
    return sum(4 * (n * n + (m * m if gradients else 0)) for m, n in shapes)


def load_statistics(path: Path, device: torch.device | str = "cpu") -> Statistics:
    """Read what `save_statistics` wrote, onto this device.

    Raises:
        InputError: the file does not hold calibration statistics, or an earlier version wrote it.
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        if "statistics" not in (file.metadata() or {}):
            raise InputError(f"{path} holds no calibration statistics; give a statistics.safetensors of a run")
        facts = json.loads(file.metadata()["statistics"])
        if "labels" not in facts:
            raise InputError(f"{path} was written by an earlier version; calibrate again")
        names = list(file.keys())
        inputs = {
            name: InputMoment(
                file.get_tensor(f"input/{name}"),
                file.get_tensor(f"mean/{name}"),
                tokens,
                Sampling(**facts["input_sampling"][name]),
            )
            for name, tokens in facts["tokens"].items()
        }
        gradients = {
            key.removeprefix("gradient/"): file.get_tensor(key) for key in names if key.startswith("gradient/")
        }
    sampling = {name: Sampling(**values) for name, values in facts["gradient_sampling"].items()}
    return Statistics(inputs, facts["groups"], gradients, facts["units"], sampling, facts["labels"])
