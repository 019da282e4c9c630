"""Accuracy × latency × megabytes of real runs: dense, low rank, and both quantised.

    python benchmarks/pareto.py MODEL --task TASK --data DATA --out benchmarks/results/pareto-NAME.json

One ``prehab-export run`` a ratio, all in one folder, so that calibration is shared; each measures the dense and the
compressed graphs in turns on ONNX Runtime and their metrics on the evaluation split. Speed-ups are over the dense
float32 graph of the same run. Writes the raw figures to NAME.json and a plot to NAME.png.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure

from prehab_export.system.machine import machine_facts

COLOURS = {"float32": "tab:blue", "int8": "tab:green", "int8-tables4": "tab:olive", "int4": "tab:orange"}


@click.command(help=__doc__)
@click.argument("model")
@click.option("--task", required=True)
@click.option("--data", required=True)
@click.option("--eval-split")
@click.option("--ratio", "ratios", type=float, multiple=True, default=(0.4, 0.6, 0.8, 0.9))
@click.option("--mode", "modes", multiple=True, default=("int8", "int4"))
@click.option("--length", type=int, help="Tokens of a request, where the model takes tokens.")
@click.option("--threads", type=int, default=2)
@click.option("--rounds", type=int, default=11)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    model: str,
    task: str,
    data: str,
    eval_split: str | None,
    ratios: tuple[float, ...],
    modes: tuple[str, ...],
    length: int | None,
    threads: int,
    rounds: int,
    out: Path,
) -> None:
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/pareto.py", *sys.argv[1:]]),
        "machine": machine_facts(),
        "points": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for ratio in ratios:
            command = ["run", model, "-o", folder, "--task", task, "--data", data, "--ratio", str(ratio)]
            command += ["--threads", str(threads), "--set", f"bench.rounds={rounds}"]
            command += [part for mode in modes for part in ("--quantize", mode)]
            command += [] if eval_split is None else ["--eval-split", eval_split]
            command += [] if length is None else ["--bench-length", str(length)]
            subprocess.run([sys.executable, "-m", "prehab_export", *command], check=True, stdout=subprocess.DEVNULL)
            facts = json.loads((Path(folder) / "report" / "report.json").read_text())
            result["metric"] = facts["metric"]
            result["points"] += points(facts, ratio)
            out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, out.with_suffix(".png"))


def points(facts: dict[str, Any], ratio: float) -> list[dict[str, Any]]:
    """One point a graph of a run."""
    verified = facts["verify"]["metrics"]
    metrics = {side: verified[f"{side}_onnx"]["value"] for side in ("dense", "compressed")}
    metrics |= {f"{row['model']} {row['mode']}": row["value"] for row in facts["quantize"]["graphs"]}
    speedups = {row["model"]: row["speedup"] for row in facts["bench"]["comparison"]} | {"dense": 1.0}
    return [
        {
            "name": case["model"],
            "ratio": 0.0 if case["model"].startswith("dense") else ratio,
            "run": ratio,
            "value": metrics[case["model"]],
            "p50_ms": case["p50_ms"],
            "speedup": speedups[case["model"]],
            "file_mb": case["file_mb"],
        }
        for case in facts["bench"]["cases"]
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Relative latency against the metric, markers as large as files; a line a number format."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for mode, colour in COLOURS.items():
        own = [row for row in result["points"] if mode == (row["name"].partition(" ")[2] or "float32")]
        if not own:
            continue
        low_rank = sorted((row for row in own if row["ratio"]), key=lambda row: row["ratio"])
        dense = [row for row in own if not row["ratio"]][:1]
        line = [*dense, *low_rank]
        axes.plot([1 / row["speedup"] for row in line], [row["value"] for row in line], color=colour, lw=1, zorder=1)
        for rows, marker, label in ((dense, "s", f"dense, {mode}"), (low_rank, "o", f"low rank, {mode}")):
            axes.scatter(
                [1 / row["speedup"] for row in rows], [row["value"] for row in rows], marker=marker, color=colour,
                s=[8 * row["file_mb"] ** 0.8 for row in rows], edgecolor="black", linewidth=0.5, label=label,
            )  # fmt: skip
        for row in low_rank:
            place = (1 / row["speedup"], row["value"])
            axes.annotate(f" {row['ratio']:.0%}, {row['file_mb']:.1f} MB", place, fontsize=6, va="bottom")
        for row in dense:
            axes.annotate(f" {row['file_mb']:.1f} MB", (1 / row["speedup"], row["value"]), fontsize=6, va="bottom")
    axes.set_xlabel("latency, relative to dense float32 (left is faster)")
    axes.set_ylabel(result["metric"]["name"])
    if not result["metric"]["higher_is_better"]:
        axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, markerscale=0.6)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
