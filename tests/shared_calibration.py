"""Calibrates and truncates small models; run as a script in several processes, it writes what each of them gets."""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from small_models import build
from test_drift import FAMILIES, batches_for

from converters.selection import select_layers
from prehab_export.compression import calibration
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.calibration import Gather, calibrate
from prehab_export.compression.closed_form import Samplesets, compress
from prehab_export.compression.moment_files import save_statistics
from prehab_export.compression.spool import Folders
from prehab_export.config.truncate import TruncateConfig
from prehab_export.inputs.data.samples import Samples
from prehab_export.system.processes import join_processes, leave_processes, together

CASES = {
    "llama": ("llama", {}, True),
    "vit": ("vit", {}, True),
    "bert-model-labels": ("bert", {"labels": "model"}, True),
    "gpt2-forward": ("gpt2", {"gradients": False}, True),
    "qwen2-whole": ("qwen2", {"sampling": False}, False),
}


def calibrated(case: str, save_to: Path | None = None) -> Calibrated:
    """Calibrate one of the models, in five batches, so that two processes have shares of different sizes."""
    family, options, by_blocks = CASES[case]
    task, model = FAMILIES[family], build(family)
    batches = batches_for(task, count=5, padded=True)
    chain = calibration._chain
    calibration._chain = chain if by_blocks else lambda *_: None
    try:
        gather = Gather(**options, save_to=save_to)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return calibrate(model, task, batches, select_layers(model), gather=gather, seed=4)
    finally:
        calibration._chain = chain


def samples_for(task):
    """The same samples as `batches_for`, of which truncation makes batches itself."""
    batches = batches_for(task, count=5, padded=True)
    columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return Samples(np.arange(40), lambda rows: {name: values[rows] for name, values in columns.items()})


def factors_of(calibrated, save_to: Path | None = None) -> dict[str, torch.Tensor]:
    """Return the product of the factors of each layer."""
    samples = samples_for(calibrated.task)
    sets = Samplesets(samples, samples, 8, Folders(save_to=save_to))
    config = TruncateConfig(ratio=0.6, objective="fisher")
    factors = compress(calibrated, sets, config).truncation.factors
    return {name: (pair.up @ pair.down).contiguous() for name, pair in factors.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    team, folder = join_processes(), Path(sys.argv[1])
    for case in CASES:
        with together():
            result = calibrated(case, folder / f"{case}-written")
        save_statistics(result.statistics, folder / f"{case}-{team.rank}")
        if CASES[case][1].get("gradients", True):
            with together():
                products = factors_of(result, folder / f"{case}-factors")
            save_file(products, folder / f"{case}-{team.rank}.safetensors")
    leave_processes()
