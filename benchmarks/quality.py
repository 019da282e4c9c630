"""Accuracy against share removed: every method on one model, with or without prehab before the cut.

    python benchmarks/quality.py MODEL --task TASK --data DATA --eval-split test --ratio 0.8 --ratio 0.9 \
        --prehab-steps 150 --out benchmarks/results/NAME.json

Methods: plain SVD, SVD-LLM (``activation`` + ``uniform``), ``fisher`` + ``uniform``, ``fisher`` + ``loss``; each on the
model as it is, after the same number of task-only steps (the control), and after prehab. All from one calibration
sample and the same batches.
"""

import copy
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import prehab_export as px
from prehab_export.evaluation import torch_predictor
from prehab_export.machine import machine_facts
from prehab_export.progress import bar, say
from prehab_export.session import held_out_split, quiet_libraries
from prehab_export.tasks import Task
from prehab_export.training import frozen_copy, train
from prehab_export.truncation import decompose_layers

METHODS = {
    "svd": ("weight", "uniform"),
    "svd-llm": ("activation", "uniform"),
    "fisher-uniform": ("fisher", "uniform"),
    "fisher-loss": ("fisher", "loss"),
}


class Bench:
    """One model, its data, and what is asked of it."""

    def __init__(
        self, model: nn.Module, task: Task, data: px.DataConfig, samples: int, seed: int, processor: Any
    ) -> None:
        self.model, self.task, self.batch_size, self.seed = model, task, data.batch_size, seed
        self.data = px.load_data(data, task, processor, model.config, seed=seed)
        self.training = held_out_split(self.data.train, seed)[1]
        self.calibration = self.training.subset(samples, seed)

    def metric(self, model: nn.Module) -> dict[str, float]:
        with bar("evaluate", len(self.data.evaluation)) as advance:
            batches = self.data.evaluation.batches(self.batch_size)
            return asdict(px.evaluate(torch_predictor(model, self.task), batches, self.task, advance))

    def statistics(self, model: nn.Module) -> px.Statistics:
        layers = px.target_layers(model)
        return px.calibrate(model, self.calibration.batches(self.batch_size), self.task, layers, seed=self.seed)

    def rows(self, model: nn.Module, ratios: tuple[float, ...], label: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The metric of every method at every ratio, one decomposition a layer and objective."""
        statistics, layers = self.statistics(model), px.target_layers(model)
        for objective in dict.fromkeys(objective for objective, _ in METHODS.values()):
            config = px.TruncateConfig(objective=objective, allocation="loss")
            decomposed = decompose_layers(layers, statistics, config)
            for method, (own, allocation) in METHODS.items():
                for ratio in ratios if own == objective else ():
                    cut = replace(config, ratio=ratio, allocation=allocation)
                    result = px.truncate(layers, statistics, cut, decomposed=decomposed)
                    candidate = px.factorize(copy.deepcopy(model), result.factors)
                    row = label | {"method": method, "ratio": ratio} | self.metric(candidate)
                    row["predicted_loss_increase"] = result.summary()["predicted_loss_increase"]
                    say(f"{label} {method} {ratio}: {row['value']:.4f}")
                    yield row


@click.command(help=__doc__)
@click.argument("model")
@click.option("--task", required=True)
@click.option("--data", required=True)
@click.option("--eval-split")
@click.option("--eval-samples", type=int)
@click.option("--ratio", "ratios", type=float, multiple=True, required=True)
@click.option("--calibration-samples", type=int, default=512)
@click.option("--batch-size", type=int, default=64)
@click.option("--prehab-steps", type=int, default=0)
@click.option("--prehab-lambda", type=float, default=px.PrehabConfig.strength)
@click.option("--prehab-ratio", type=float, help="Ratio whose ranks prehab aims at; the last --ratio by default.")
@click.option("--surrogate", default="tail")
@click.option("--whitening", default="fisher")
@click.option("--lr", type=float, default=3e-4)
@click.option("--distill", type=float, default=0.5)
@click.option("--seed", type=int, default=0)
@click.option("--threads", type=int, default=2)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(model: str, task: str, data: str, ratios: tuple[float, ...], seed: int, out: Path, **options: Any) -> None:
    torch.set_num_threads(options["threads"])
    quiet_libraries()
    chosen = px.TASKS[task]
    config = px.DataConfig(
        data, eval_split=options["eval_split"], eval_samples=options["eval_samples"], batch_size=options["batch_size"]
    )
    dense = px.load_model(model, chosen)
    bench = Bench(dense, chosen, config, options["calibration_samples"], seed, px.load_processor(model, chosen))
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/quality.py", *sys.argv[1:]]),
        "machine": machine_facts(),
        "dense": bench.metric(dense),
        "rows": list(bench.rows(dense, ratios, {"before": "nothing"})),
        "training": [],
    }
    if options["prehab_steps"]:
        aim = options["prehab_ratio"] or ratios[-1]
        for before in ("task-only", "prehab"):
            tuned = copy.deepcopy(dense)
            started = time.monotonic()
            history = _tuned(tuned, bench, before, aim, options)
            facts = {"before": before, "steps": len(history), "seconds": time.monotonic() - started}
            result["training"].append(facts | {"dense": bench.metric(tuned), "history": history})
            result["rows"] += bench.rows(tuned, ratios, {"before": before})
    out.write_text(json.dumps(result, indent=1) + "\n")


def _tuned(
    model: nn.Module, bench: Bench, before: str, ratio: float, options: dict[str, Any]
) -> list[dict[str, float]]:
    training = px.TrainConfig(
        steps=options["prehab_steps"],
        batch_size=options["batch_size"],
        learning_rate=options["lr"],
        distill=options["distill"],
    )
    with bar(before, training.steps) as advance:
        if before == "task-only":
            teacher = frozen_copy(model) if training.distill else None
            parameters = list(model.parameters())
            return train(
                model, bench.task, bench.training, training, parameters, seed=bench.seed, teacher=teacher,
                progress=lambda row: advance(1, note=f"{row['task_loss']:.3f}"),
            )  # fmt: skip
        return px.prehab(
            model,
            bench.task,
            bench.training,
            px.target_layers(model),
            bench.statistics(model),
            px.PrehabConfig(
                train=training,
                surrogate=options["surrogate"],
                strength=options["prehab_lambda"],
                whitening=options["whitening"],
            ),
            px.TruncateConfig(ratio=ratio, objective="activation", allocation="uniform"),
            seed=bench.seed,
            progress=lambda row: advance(1, note=f"{row['task_loss']:.3f}, surrogate {row['surrogate']:.3f}"),
        )


if __name__ == "__main__":
    main()
