"""How many predicted tokens the gradient moments need: perplexity after truncation with gradients from a part of them.

    python benchmarks/gradient_units.py MODEL --data DATA --windows 128 --length 256 --out results.json

Input moments and the drift walk always use all windows; only the gradients come from the first part of them.
"""

import json
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import click
import torch

from prehab_export.compression.calibration import CalibrationWarning, Gather, calibrate
from prehab_export.compression.closed_form import Samplesets, compress
from prehab_export.compression.training import sharing_copy
from prehab_export.config.data import DataConfig
from prehab_export.config.truncate import TruncateConfig
from prehab_export.inputs.data.loading import load_data
from prehab_export.inputs.evaluation import evaluate, torch_predictor
from prehab_export.inputs.models import load_config, load_model, load_processor
from prehab_export.inputs.tasks import TASKS
from prehab_export.system.machine import machine_facts

TASK = TASKS["text-generation"]


@click.command(help=__doc__)
@click.argument("name", metavar="MODEL")
@click.option("--data", required=True)
@click.option("--windows", type=int, default=128)
@click.option("--length", type=int, default=256, help="Tokens in a window.")
@click.option("--evaluation", type=int, default=120, help="Windows of the evaluation split.")
@click.option("--share", "shares", type=float, multiple=True, default=(1.0, 0.5, 0.25))
@click.option("--ratio", "ratios", type=float, multiple=True, default=(0.4, 0.6))
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1))
@click.option("--threads", type=int, default=2)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(name: str, out: Path, **options: Any) -> None:
    warnings.simplefilter("ignore", CalibrationWarning)
    torch.set_num_threads(options["threads"])
    data_options = DataConfig(options["data"], sequence_length=options["length"])
    data = load_data(data_options, TASK, load_processor(name, TASK), load_config(name), seed=0)
    evaluation, model = data.evaluation.first(options["evaluation"]), load_model(name, TASK, dtype=None)
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/gradient_units.py", *sys.argv[1:]]),
        "machine": machine_facts(),
        "dense": evaluate(torch_predictor(model, TASK), TASK, evaluation.batches(8)).value,
        "rows": [],
    }
    for seed in options["seeds"]:
        samples = data.train.subset(options["windows"], seed)
        for share in options["shares"]:
            units = int(share * options["windows"] * (options["length"] - 1))
            start = time.perf_counter()
            calibrated = calibrate(model, TASK, samples.batches(32), gather=Gather(gradient_units=units))
            seconds = time.perf_counter() - start
            for ratio in options["ratios"]:
                truncation = compress(calibrated, Samplesets(samples, samples), TruncateConfig(ratio=ratio)).truncation
                student = truncation.apply(sharing_copy(model))
                value = evaluate(torch_predictor(student, TASK), TASK, evaluation.batches(8)).value
                row = {"seed": seed, "share": share, "units": units, "ratio": ratio, "perplexity": value}
                result["rows"].append(row | {"calibrate_s": seconds})
            out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
