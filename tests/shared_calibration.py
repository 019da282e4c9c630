"""Calibrates small models; run as a script in each of several processes, it writes what each of them gets."""

import sys
import warnings
from pathlib import Path

import torch
from small_models import build
from test_drift import FAMILIES, batches_for

from converters.selection import select_layers
from prehab_export.compression import calibration
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.calibration import Gather, calibrate
from prehab_export.compression.moment_files import save_statistics
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    team, folder = join_processes(), Path(sys.argv[1])
    for case in CASES:
        with together():
            statistics = calibrated(case, folder / f"{case}-written").statistics
        save_statistics(statistics, folder / f"{case}-{team.rank}")
    leave_processes()
