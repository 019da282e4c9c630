"""Quantised graphs of compressed models, plain and with their factors fitted to the grid: a run a ratio, each up to its
quantised graphs.

    python benchmarks/grid.py MODEL --task TASK --data DATA --eval-split test --ratio 0.6 --ratio 0.8 \
        --mode int4 --mode int8 --work runs --out benchmarks/results/grid-NAME.json

The runs are resumed, so that more modes and ratios can be asked for later. ``kept`` says what a run decided by the loss
on held-out samples; the metrics beside it are of the evaluation split.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

import prehab_export as px
from converters.onnx.modes import MODES
from prehab_export.config.options import from_dict
from prehab_export.config.run import RunConfig
from prehab_export.system.machine import machine_facts


@click.command(help=__doc__)
@click.argument("model")
@click.option("--task", required=True)
@click.option("--data", required=True)
@click.option("--train-split")
@click.option("--eval-split")
@click.option("--eval-samples", type=int)
@click.option("--sequence-length", type=int)
@click.option("--batch-size", type=int, default=32)
@click.option("--calibration-samples", type=int, default=256)
@click.option("--ratio", "ratios", type=float, multiple=True, required=True)
@click.option("--mode", "modes", type=click.Choice(MODES), multiple=True, required=True)
@click.option("--threads", type=int, default=2)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for the runs.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    model: str, task: str, calibration_samples: int, ratios: tuple[float, ...], modes: tuple[str, ...], threads: int,
    work: Path, out: Path, **data: Any,
) -> None:  # fmt: skip
    rows = []
    for ratio in ratios:
        config = {
            "model": model, "task": task, "data": data, "calibrate": {"samples": calibration_samples},
            "truncate": {"ratio": ratio}, "quantize": modes, "bench": {"threads": threads},
        }  # fmt: skip
        workspace = px.run(from_dict(RunConfig, config), work / f"{Path(model).name}-{ratio:g}", until="quantize")
        metrics = workspace.read_json("verify", "verify.json")["metrics"]
        rows += [{"ratio": ratio, "model": side, "mode": "float32"} | metrics[f"{side}_onnx"] for side in SIDES]
        rows += [{"ratio": ratio} | row for row in workspace.read_json("quantize", "quantize.json")["graphs"]]
    command = shlex.join(["python", "benchmarks/grid.py", *sys.argv[1:]])
    out.write_text(json.dumps({"command": command, "machine": machine_facts(), "rows": rows}, indent=1) + "\n")


SIDES = ("dense", "compressed")

if __name__ == "__main__":
    main()
