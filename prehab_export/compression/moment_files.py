"""Saves moments as a folder of safetensors files, part by part, and maps them from there one at a time.

The moments of a large model take more memory than the model (64 GB for 7 billion parameters), so they are never in
memory together: those of one block are written before the next is calibrated, and read when they are used.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from converters.errors import InputError
from converters.publishing import publish_text
from prehab_export.compression.checkpoints import save_beside
from prehab_export.compression.moments import InputMoment, Lookup, Statistics
from prehab_export.linalg import Sampling
from prehab_export.system import team

# Names the files of the parts. Without it a folder holds nothing that can be read.
INDEX = "index.json"
_METADATA = "statistics"


@dataclass
class MomentWriter:
    """Writes moments to a folder, one part of the model after the other.

    The folder can be read only after `finish`. Of processes that work together the first one writes, and all read.

    files: names of the files of the parts that are complete.
    """

    folder: Path
    files: list[str] = field(default_factory=list)

    def keep(self, parts: int) -> list[Statistics]:
        """Return the first parts that an earlier process wrote, and write after them from now on.

        Raises:
            InputError: a file of them is missing or damaged.
        """
        self.files = [_part_name(number) for number in range(parts)]
        return [_read_part(self.folder / name, torch.device("cpu")) for name in self.files]

    def add(self, part: Statistics) -> Statistics:
        """Write the moments of some layers, and return them as they can be read from the file."""
        tensors = {f"gradient/{name}": gradient for name, gradient in part.gradients.items()}
        for group, moment in part.inputs.items():
            tensors[f"input/{group}"], tensors[f"mean/{group}"] = moment.second_moment, moment.mean
        facts = {
            "groups": part.groups,
            "tokens": {group: moment.tokens for group, moment in part.inputs.items()},
            "units": part.units,
            "input_sampling": {group: asdict(moment.sampling) for group, moment in part.inputs.items()},
            "gradient_sampling": {name: asdict(sampling) for name, sampling in part.gradient_sampling.items()},
        }
        name = _part_name(len(self.files))
        if team().leads:
            stored = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
            save_beside(stored, self.folder / name, {_METADATA: json.dumps(facts)})
        team().wait()
        self.files.append(name)
        return _read_part(self.folder / name, torch.device("cpu"))

    def finish(self, layers: Sequence[str], labels: str) -> None:
        """Complete the folder.

        Args:
            layers: the layers of all parts, in the order in which they were selected.
            labels: where the labels for the gradients came from.
        """
        index = {"files": self.files, "layers": list(layers), "labels": labels}
        if team().leads:
            for unused in set(self.folder.glob(_part_name("*"))) - {self.folder / name for name in self.files}:
                unused.unlink()
            publish_text(self.folder / INDEX, json.dumps(index, indent=1) + "\n")
        team().wait()


def _part_name(number: int | str) -> str:
    return f"{number:05d}.safetensors" if isinstance(number, int) else f"{number}.safetensors"


def save_statistics(statistics: Statistics, folder: Path) -> None:
    """Write moments into a new folder."""
    writer = MomentWriter(folder)
    writer.add(statistics)
    writer.finish(list(statistics.groups), statistics.labels)


def load_statistics(folder: Path, device: torch.device | str = "cpu") -> Statistics:
    """Return the moments that `save_statistics` or a `MomentWriter` wrote, for use on this device.

    Raises:
        InputError: the folder does not hold moments, or a file of it is missing or damaged.
    """
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} holds no calibration statistics; give the statistics folder of a run")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    parts = [_read_part(folder / name, torch.device(device)) for name in index["files"]]
    return replace(Statistics.joined(parts, index["layers"]), labels=index["labels"])


def _read_part(path: Path, device: torch.device) -> Statistics:
    try:
        with safe_open(path, framework="pt") as file:
            names, facts = set(file.keys()), json.loads(file.metadata()[_METADATA])
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is missing or damaged ({error}); calibrate again") from error

    def moment(group: str) -> InputMoment:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return InputMoment(
                file.get_tensor(f"input/{group}"),
                file.get_tensor(f"mean/{group}"),
                facts["tokens"][group],
                Sampling(**facts["input_sampling"][group]),
            )

    def gradient(name: str) -> torch.Tensor:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return file.get_tensor(f"gradient/{name}")

    return Statistics(
        Lookup(facts["tokens"], moment),
        facts["groups"],
        Lookup((name for name in facts["groups"] if f"gradient/{name}" in names), gradient),
        facts["units"],
        {name: Sampling(**values) for name, values in facts["gradient_sampling"].items()},
    )
