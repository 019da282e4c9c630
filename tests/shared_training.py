"""Trains small models; run as a script in each of several processes, it writes what each of them gets."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from small_models import build, truncated
from test_drift import batches_for

from converters.selection import select_layers
from prehab_export.compression.bases import factor_bases
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.calibration import calibrate
from prehab_export.compression.factored import Factored
from prehab_export.compression.prehabilitation import prehab
from prehab_export.compression.refinement import refine
from prehab_export.compression.rehabilitation import rehab
from prehab_export.config.training import PrehabConfig, RefineConfig, RefineSchedule, RehabConfig, TrainConfig
from prehab_export.config.truncate import TruncateConfig
from prehab_export.inputs.data.samples import Samples
from prehab_export.inputs.evaluation import evaluate, torch_predictor
from prehab_export.inputs.tasks import TASKS
from prehab_export.linalg.eigenbasis_adamw import Basis
from prehab_export.system.processes import join_processes, leave_processes, together

STEPS = TrainConfig(steps=5, batch_size=5, learning_rate=3e-3)
PREHAB = {"train": STEPS, "refresh_every": 2, "every": 2, "refresh_samples": 12}
CASES = {
    "prehab, proximal": ("vit", PrehabConfig(**PREHAB)),
    "prehab, gradient": ("llama-tied", PrehabConfig(**PREHAB, surrogate="stable-rank", update="gradient")),
    "prehab, random": ("vit", PrehabConfig(**PREHAB, surrogate="stochastic-stable-rank", update="gradient")),
    "refine": ("bert", RefineConfig(RefineSchedule(steps=5, batch_size=5), hidden_share=0.3)),
    "rehab, factors": ("llama", RehabConfig(STEPS)),
    "rehab, all": ("vit", RehabConfig(STEPS, "all")),
    "rehab, lora": ("bert", RehabConfig(STEPS, "lora", lora_rank=2)),
}
TASK_OF = {"vit": "image-classification", "bert": "text-classification"}


def samples_for(task, dtype):
    batches = batches_for(task, count=4, padded=True)
    columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    columns = {name: values.to(dtype) if values.is_floating_point() else values for name, values in columns.items()}
    return Samples(np.arange(32), lambda rows: {name: values[rows] for name, values in columns.items()})


def trained(case):
    """Train one of the models. It is in float64, since Adam turns gradients of rounding errors into whole steps."""
    family, config = CASES[case]
    task, model = TASKS[TASK_OF.get(family, "text-generation")], build(family, torch.float64)
    samples = samples_for(task, torch.float64)

    def held_out_loss(candidate):
        return evaluate(torch_predictor(candidate, task), task, samples.first(9).batches(2)).loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        statistics = calibrate(model, task, samples.batches(8), select_layers(model), seed=1).statistics
    if isinstance(config, PrehabConfig):
        calibrated = Calibrated(model, task, statistics)
        cut = TruncateConfig(ratio=0.6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = prehab(calibrated, samples, config, cut, evaluate=lambda m: {"held_out": held_out_loss(m)})
        return model, rows
    teacher = build(family, torch.float64)
    truncated(model, keep=lambda name: name in statistics.groups)
    bases = {
        parameter: Basis(*(None if each is None else each.double() for each in (basis.left, basis.right)))
        for parameter, basis in factor_bases(model, statistics).items()
    }
    factored = Factored(model, task, bases)
    if isinstance(config, RefineConfig):
        return model, refine(factored, samples, config, teacher=teacher)
    result = rehab(factored, samples, config, held_out_loss=held_out_loss, teacher=teacher)
    return model, result.history + result.parts


if __name__ == "__main__":
    torch.set_num_threads(1)
    team, folder = join_processes(), Path(sys.argv[1])
    for case in CASES:
        with together():
            model, rows = trained(case)
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        save_file(weights, folder / f"{case}-{team.rank}.safetensors")
        (folder / f"{case}-{team.rank}.json").write_text(json.dumps(rows), encoding="utf-8")
    leave_processes()
