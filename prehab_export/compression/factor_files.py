"""Writes the factors of a model to a folder, block by block, and maps them from there.

The factors of a large model take more memory than a machine may have. Those of one block are written before the next is
fitted, and what is mapped from a file takes memory only while it is used.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from converters.lowrank import Factors
from prehab_export.compression.checkpoints import save_beside
from prehab_export.compression.truncation import LayerResult, Refit
from prehab_export.system import team

_METADATA = "factors"


@dataclass(frozen=True)
class FittedBlock:
    """The new weights of the layers that were fitted with one block.

    factors: layer → its factors.
    refits: layer that stays dense → its new weight.
    results: results of the layers that were fitted.
    unfitted: layers that could not be fitted, and keep the plan's factors.
    """

    factors: Mapping[str, Factors]
    refits: Mapping[str, Refit]
    results: Sequence[LayerResult]
    unfitted: Sequence[str]


@dataclass(frozen=True)
class FactorFiles:
    """A folder with one file for each block that was fitted.

    device: the device to read tensors to; on the CPU they are mapped.
    """

    folder: Path
    device: torch.device

    def write(self, number: int, block: FittedBlock) -> FittedBlock:
        """Write the block with this number, and return it with tensors that are mapped from the file.

        Of processes that work together, the first one writes, and all read.

        Raises:
            OSError: the disk is full or cannot be written to.
        """
        tensors: dict[str, Tensor] = {}
        owners: dict[int, str] = {}
        for name, pair in block.factors.items():
            tensors[f"up/{name}"] = pair.up
            if owners.setdefault(id(pair.down), name) == name:
                tensors[f"down/{name}"] = pair.down
            if pair.bias is not None:
                tensors[f"bias/{name}"] = pair.bias
        for name, refit in block.refits.items():
            tensors[f"weight/{name}"] = refit.weight
            if refit.bias is not None:
                tensors[f"bias/{name}"] = refit.bias
        facts = {
            "downs": {name: owners[id(pair.down)] for name, pair in block.factors.items()},
            "refits": list(block.refits),
            "results": [asdict(result) for result in block.results],
            "unfitted": list(block.unfitted),
        }
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if team().leads:
            save_beside(stored, self._path(number), {_METADATA: json.dumps(facts)})
        team().wait()
        return self.read(number)

    def read(self, number: int) -> FittedBlock:
        """Return the block with this number; its tensors are mapped from the file.

        Raises:
            OSError, SafetensorError: the file is missing or damaged.
        """
        with safe_open(self._path(number), framework="pt", device=str(self.device)) as file:
            facts, names = json.loads(file.metadata()[_METADATA]), set(file.keys())
            downs = {owner: file.get_tensor(f"down/{owner}") for owner in dict.fromkeys(facts["downs"].values())}
            biases = {key.removeprefix("bias/"): file.get_tensor(key) for key in names if key.startswith("bias/")}
            return FittedBlock(
                {
                    name: Factors(file.get_tensor(f"up/{name}"), downs[owner], biases.get(name))
                    for name, owner in facts["downs"].items()
                },
                {name: Refit(file.get_tensor(f"weight/{name}"), biases.get(name)) for name in facts["refits"]},
                [LayerResult(**result) for result in facts["results"]],
                facts["unfitted"],
            )

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"
