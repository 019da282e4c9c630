"""The experiments that the Prehab paper (arXiv 2512.01980) starts with, the checks it leaves open, and what G is best
made of, on one model.

    python benchmarks/paper_checks.py steps  MODEL --task TASK --data DATA --eval-split test --out NAME.json
    python benchmarks/paper_checks.py lambda MODEL …       # λ from 1e-3 to 1e3
    python benchmarks/paper_checks.py sample MODEL … [--shifted-data OTHER]
    python benchmarks/paper_checks.py gradients MODEL … --samples 32 --samples 512

``steps``: does the dense model stay good while the surrogate falls? ``lambda``: what λ does to the dense model and to
the truncated one. ``sample``: how many calibration samples it takes, and what another domain costs. ``gradients``:
given labels or the model's own behind G, and G shrunk as far as its sampling error asks or not. Each writes its raw
figures to NAME.json and a plot to NAME.png.
"""

import copy
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from quality import RECIPES, Bench, Options

import prehab_export as px
from prehab_export.config.calibrate import FISHER_LABELS
from prehab_export.pipeline.session import held_out_split, quiet_libraries
from prehab_export.pipeline.sweep_methods import METHODS
from prehab_export.system.machine import machine_facts
from prehab_export.system.progress import named
from prehab_export.system.terminal import bar, say

LAMBDAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
CUTS = ("svd-llm", "fisher", "drift")


@dataclass(frozen=True)
class Asked:
    """ratio: of the cut. samples: sizes of calibration samples. shifted: data of another domain to draw them from."""

    ratio: float
    samples: tuple[int, ...]
    shifted: str | None


def steps(bench: Bench, asked: Asked) -> list[dict[str, Any]]:
    """Dense metric, task loss and surrogate along one prehab."""
    rows = []
    for strength in (0.0, bench.options.strength):
        model, options = copy.deepcopy(bench.model), bench.options
        training = px.TrainConfig(options.steps, options.batch_size, options.lr, distill=options.distill)
        config = px.PrehabConfig(
            training, surrogate=options.surrogate, strength=strength, whitening=options.whitening,
            update=options.update, layer_weights=options.layer_weights, refresh_every=options.refresh_every,
        )  # fmt: skip
        history = px.prehab(
            px.Calibrated(model, bench.task, bench.statistics),
            bench.training,
            config,
            METHODS["svd-llm"].at(asked.ratio, px.TruncateConfig()),
            evaluate=lambda candidate: {"dense": bench.metric(candidate)["value"]},
            progress=named(bar, f"λ = {strength:g}"),
        )
        rows += [row | {"lambda": strength} for row in history]
    return rows


def strengths(bench: Bench, asked: Asked) -> list[dict[str, Any]]:
    """The dense and the truncated model after prehab with each λ."""
    rows = []
    for strength in (0.0, *LAMBDAS):
        bench.options = replace(bench.options, strength=strength)
        model, _ = bench.tuned(RECIPES["prehab + svd-llm"], asked.ratio, bench.options.steps, seed=0)
        dense = bench.metric(model)
        truncated = bench.metric(bench.cut(model, bench.calibrated(model), "svd-llm", asked.ratio)[0])
        say(f"λ = {strength:g}: dense {dense['value']:.4f}, truncated {truncated['value']:.4f}")
        rows.append({"lambda": strength, "dense_value": dense["value"], **truncated})
    return rows


def samples(bench: Bench, asked: Asked) -> list[dict[str, Any]]:
    """The truncated model, no training, by calibration sample."""
    own, rows = bench.training, []
    domains = {"own": own}
    if asked.shifted is not None:
        other = px.load_data(px.DataConfig(asked.shifted), bench.task, bench.processor, bench.model.config, seed=0)
        domains["shifted"] = held_out_split(other.train, 0)[1]
    for domain, training in domains.items():
        for count in asked.samples:
            if count > len(training):
                say(f"{domain}: only {len(training)} samples, {count} left out")
                continue
            bench.use_calibration(training.subset(count, 0))
            for cut in CUTS:
                row = bench.row(cut, asked.ratio, seed=0)
                say(f"{domain} {count} {cut}: {row['value']:.4f}")
                rows.append(
                    {"domain": domain, "samples": count, "cut": cut, "value": row["value"], "loss": row["loss"]}
                )
    return rows


def gradients(bench: Bench, asked: Asked) -> list[dict[str, Any]]:
    """The truncated model, no training, by the labels behind G and its shrinkage."""
    rows = []
    for count in asked.samples:
        for labels in FISHER_LABELS:
            bench.options = replace(bench.options, fisher_labels=labels)
            bench.use_calibration(bench.training.subset(count, 0))
            shrunk = bench.statistics
            certain = {name: replace(sampling, error=0.0) for name, sampling in shrunk.gradient_sampling.items()}
            for kind, statistics in (("shrunk", shrunk), ("as it is", replace(shrunk, gradient_sampling=certain))):
                bench.use_calibration(bench.calibration)
                bench.statistics = statistics
                for cut in CUTS[1:]:
                    row = bench.row(cut, asked.ratio, seed=0)
                    say(f"{count}, labels {labels}, {kind}, {cut}: {row['value']:.4f}")
                    facts = {"samples": count, "labels": labels, "gradient_moment": kind, "cut": cut}
                    rows.append(facts | {"value": row["value"], "loss": row["loss"]})
    return rows


CHECKS: dict[str, Callable[[Bench, Asked], list[dict[str, Any]]]] = {
    "steps": steps,
    "lambda": strengths,
    "sample": samples,
    "gradients": gradients,
}


def plot(check: str, rows: list[dict[str, Any]], dense: dict[str, Any], path: Path) -> None:
    domains = dict.fromkeys(row["domain"] for row in rows) if check == "sample" else {}
    columns = len(domains) or 2
    counts = sorted({row["samples"] for row in rows if "samples" in row})
    figure = Figure(figsize=(3.75 * columns, 3.2), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    left, right = panels[0], panels[-1]
    if check == "steps":
        for strength in dict.fromkeys(row["lambda"] for row in rows):
            own = [row for row in rows if row["lambda"] == strength]
            measured = [row for row in own if "dense" in row]
            label = f"λ = {strength:g}"
            left.plot([r["step"] for r in measured], [r["dense"] for r in measured], marker="o", ms=3, label=label)
            right.plot([r["step"] for r in own], [r["surrogate"] for r in own], label=label)
        left.set_title(f"{dense['metric']} of the dense model", fontsize=9)
        right.set_title("surrogate (1 at the start)", fontsize=9)
        right.set_yscale("log")
        for axes in (left, right):
            axes.set_xlabel("step")
    elif check == "lambda":
        trained = [row for row in rows if row["lambda"] > 0]
        for axes, key, title in ((left, "dense_value", "dense"), (right, "value", "after SVD-LLM")):
            axes.semilogx([r["lambda"] for r in trained], [r[key] for r in trained], marker="o", ms=4)
            axes.axhline(rows[0][key], color="0.5", linestyle=":")
            axes.set_title(f"{dense['metric']}, {title} (dotted: λ = 0)", fontsize=9)
            axes.set_xlabel("λ")
    elif check == "gradients":
        for axes, cut in zip(panels, CUTS[1:], strict=True):
            for labels in FISHER_LABELS:
                for kind, line in (("shrunk", "-"), ("as it is", "--")):
                    own = [r for r in rows if (r["cut"], r["labels"], r["gradient_moment"]) == (cut, labels, kind)]
                    axes.semilogx(
                        [r["samples"] for r in own], [r["value"] for r in own], line, marker="o", ms=4,
                        color={"data": "tab:blue", "model": "tab:orange"}[labels], label=f"labels: {labels}; {kind}",
                    )  # fmt: skip
            axes.axhline(dense["value"], color="0.5", linestyle=":")
            axes.set_title(f"{dense['metric']}, {cut} (dotted: dense)", fontsize=9)
    else:
        for axes, domain in zip(panels, domains, strict=True):
            for cut in CUTS:
                own = [row for row in rows if row["cut"] == cut and row["domain"] == domain]
                axes.semilogx([r["samples"] for r in own], [r["value"] for r in own], marker="o", ms=4, label=cut)
            axes.axhline(dense["value"], color="0.5", linestyle=":")
            where = "its own domain" if domain == "own" else "another domain"
            axes.set_title(f"{dense['metric']}, calibrated on {where}\n(dotted: dense)", fontsize=9)
    for axes in panels:
        if counts:
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.minorticks_off()
            axes.set_xlabel("calibration samples")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


@click.command(help=__doc__)
@click.argument("check", type=click.Choice(list(CHECKS)))
@click.argument("model")
@click.option("--task", required=True)
@click.option("--data", required=True)
@click.option("--train-split")
@click.option("--eval-split")
@click.option("--eval-samples", type=int, default=10**6, show_default="all")
@click.option("--evaluation-batch", type=int, default=32)
@click.option("--shifted-data", help="For sample: data of another domain.")
@click.option("--samples", type=int, multiple=True, default=(32, 256, 1024), help="For sample: how many.")
@click.option("--refresh-every", type=int, default=16, help="For steps: the dense model is measured as often.")
@click.option("--ratio", type=float, default=0.8)
@click.option("--steps", type=int, default=100)
@click.option("--batch-size", type=int, default=64)
@click.option("--lr", type=float, default=3e-4)
@click.option("--prehab-lambda", "strength", type=float, default=px.PrehabConfig.strength)
@click.option("--threads", type=int, default=2)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(check: str, model: str, task: str, threads: int, out: Path, **rest: Any) -> None:
    torch.set_num_threads(threads)
    quiet_libraries()
    asked = Asked(rest.pop("ratio"), rest.pop("samples"), rest.pop("shifted_data"))
    data = {key: rest.pop(key) for key in ("data", "train_split", "eval_split", "eval_samples")}
    data["batch_size"] = rest.pop("evaluation_batch")
    options, chosen = Options(**rest), px.TASKS[task]
    dense = px.load_model(model, chosen)
    bench = Bench(dense, chosen, px.DataConfig(**data), options, px.load_processor(model, chosen))
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/paper_checks.py", *sys.argv[1:]]),
        "machine": machine_facts(),
        "options": asdict(options) | asdict(asked),
        "dense": bench.metric(dense),
    }
    result["rows"] = CHECKS[check](bench, asked)
    out.write_text(json.dumps(result, indent=1) + "\n")
    plot(check, result["rows"], result["dense"], out.with_suffix(".png"))


if __name__ == "__main__":
    main()
