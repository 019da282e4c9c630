"""What prehab's regulariser adds to a training step, at full-size shapes with random weights.

    python benchmarks/regulariser.py --threads 2 --out benchmarks/results/regulariser.json

Plain AdamW steps on the task loss (no distillation, which would only make the step longer) alternate with the
regulariser's part of ``--between`` steps, one surrogate after the other; layers take turns over ``every`` steps, so the
share is the mean over whole turns over the median plain step. A refresh (fresh moments, ranks, bases) is timed once
and spread over ``refresh_every`` steps. Against it, the published repository's ways (github.com/niqretnuh/PREHAB-SVD),
with autograd, on the layers of one block, times the number of blocks: ``nuclear`` with two float64 eigendecompositions
a matrix and step (one for the loss, one for the logged rank), and ``spectral`` with 50 power iterations. Their whitened
weights are taken as given: the product with the whitening matrix and its inverse in the forward pass are not counted.
"""

import json
import shlex
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import torch
import transformers
from torch import Tensor, nn

import prehab_export as px
from converters.lowrank import DenseLinear, dense_weight
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.calibration import CalibrationWarning, Gather
from prehab_export.compression.regulariser import Regulariser
from prehab_export.config.training import PROXIMAL_SURROGATES, SURROGATES
from prehab_export.inputs.tasks import Batch, Task
from prehab_export.pipeline.session import quiet_libraries
from prehab_export.system.machine import machine_facts

VARIANTS = [("gradient", name) for name in SURROGATES] + [("proximal", name) for name in PROXIMAL_SURROGATES]
TASKS = {"bert-base": "text-classification", "vit-b16": "image-classification"}


@click.command(help=__doc__)
@click.option("--model", "models", type=click.Choice(list(TASKS)), multiple=True, default=tuple(TASKS))
@click.option("--bert-batch", type=int, default=32, help="Sentences of 128 tokens a step.")
@click.option("--vit-batch", type=int, default=16, help="Images of 224×224 a step.")
@click.option("--blocks", type=int, help="Blocks of the model, for a quick look; the model's own number by default.")
@click.option("--surrogate", "only", multiple=True, help="Only these surrogates.")
@click.option("--between", type=int, default=4, help="Parts of the regulariser from one plain step to the next.")
@click.option("--turns", type=int, default=1, help="Whole turns of the layers to time, for each surrogate.")
@click.option("--ratio", type=float, default=0.6)
@click.option("--every", type=int, default=px.PrehabConfig.every)
@click.option("--refresh-every", type=int, default=px.PrehabConfig.refresh_every)
@click.option("--refresh-samples", type=int, default=px.PrehabConfig.refresh_samples)
@click.option("--threads", type=int, default=2)
@click.option("--device", default="cpu")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(models: tuple[str, ...], only: tuple[str, ...], out: Path, **options: Any) -> None:
    torch.set_num_threads(options["threads"])
    quiet_libraries()
    warnings.simplefilter("ignore", CalibrationWarning)  # one batch is enough for a clock
    result = {
        "command": shlex.join(["python", "benchmarks/regulariser.py", *sys.argv[1:]]),
        "machine": machine_facts(),
        "options": options,
        "models": [_measured(name, only, options) for name in models],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


def _measured(name: str, only: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model, batch = _bert(options) if name == "bert-base" else _vit(options)
    model, batch = model.to(options["device"]), {key: value.to(options["device"]) for key, value in batch.items()}
    bench = Bench(model.eval(), px.TASKS[TASKS[name]], batch, options)
    bench.step()  # warm-up: the optimiser's state is made here
    rows = [bench.variant(update, surrogate) for update, surrogate in VARIANTS if not only or surrogate in only]
    plain = median(bench.plain)
    published = bench.published()
    for row in rows:
        row["share"] = row["seconds_a_step"] / plain
        row["share_with_refresh"] = (row["seconds_a_step"] + row["refresh_seconds"] / options["refresh_every"]) / plain
        nearest = "spectral" if row["surrogate"] == "spectral" else "nuclear"
        row["published_over_ours"] = published[nearest] / row["seconds_a_step"]
        click.echo(f"{name} {row}", err=True)
    shares = {way: seconds / plain for way, seconds in published.items()}
    click.echo(f"{name}: plain step {plain:.2f} s; the published ways add {shares}", err=True)
    tokens = next(iter(bench.statistics.inputs.values())).tokens
    return {
        "model": name,
        "tokens_a_step": tokens,
        "plain_step_seconds": plain,
        "plain_steps": bench.plain,
        "ours": rows,
        "published_seconds_a_step": published,
        "published_share": shares,
        "published_measured_on": "the selected layers of one block, times the number of blocks",
    }


class Bench:
    """One model with its batch, optimiser and moments, and the plain steps timed so far."""

    def __init__(self, model: nn.Module, task: Task, batch: Batch, options: dict[str, Any]) -> None:
        self.model, self.task, self.batch, self.options = model, task, batch, options
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        self.layers: Mapping[str, DenseLinear] = px.select_layers(model)
        self.truncation = px.TruncateConfig(ratio=options["ratio"])
        self.plain: list[float] = []
        self.statistics = px.calibrate(model, task, [batch], self.layers).statistics

    def step(self) -> float:
        """Seconds of one plain training step; its gradients stay."""
        started = self._now()
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.task.unit_logits(self.task.logits(self.model, self.batch), self.batch).float()
        nn.functional.cross_entropy(logits, self.task.unit_labels(self.batch)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return self._now() - started

    def variant(self, update: str, surrogate: str) -> dict[str, Any]:
        every = self.options["every"]
        config = px.PrehabConfig(surrogate=surrogate, update=update, every=every)
        regulariser = Regulariser(Calibrated(self.model, self.task, self.statistics), config, self.truncation)
        regulariser.refresh(self.statistics)  # the first makes the starts and the weights as well
        began = self._now()
        size = next(iter(self.batch.values())).shape[0]
        passes = -(-self.options["refresh_samples"] // size)
        fresh = px.calibrate(
            self.model, self.task, [self.batch] * passes, self.layers, gather=Gather(sampling=False)
        ).statistics
        calibrated = self._now()
        regulariser.refresh(fresh)
        refreshed = self._now()
        if update == "gradient":
            regulariser.add_gradients(0, 0.0)  # all layers, once, as at the start of a run
        act, extra = regulariser.add_gradients if update == "gradient" else regulariser.shrink, []
        for step in range(every * self.options["turns"]):
            if step % self.options["between"] == 0:
                self.plain.append(self.step())
            started = self._now()
            act(step, 1e-6)
            extra.append(self._now() - started)
        return {
            "update": update,
            "surrogate": surrogate,
            "seconds_a_step": mean(extra),
            "seconds_by_step": extra,
            "refresh_seconds": refreshed - began,
            "refresh_moments_seconds": calibrated - began,
            "refresh_bases_seconds": refreshed - calibrated,
        }

    def published(self) -> dict[str, float]:
        """Seconds a step of the published repository's surrogates and their gradients, all layers."""
        block = _first_block(self.layers)
        factor = len(self.layers) / len(block)
        ways = {"nuclear": _published_nuclear, "spectral": _published_spectral}
        seconds = dict.fromkeys(ways, 0.0)
        for way, surrogate in ways.items():
            for layer in block.values():
                weight = dense_weight(layer).detach().double().requires_grad_()
                started = self._now()
                surrogate(weight).backward()
                seconds[way] += factor * (self._now() - started)
        return seconds

    def _now(self) -> float:
        if self.options["device"].startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


def _published_nuclear(weight: Tensor) -> Tensor:
    """Σ √λ of the smaller Gram matrix, by eigendecomposition with autograd; the same again for the logged rank."""
    gram = weight.T @ weight if weight.shape[0] >= weight.shape[1] else weight @ weight.T
    gram = 0.5 * (gram + gram.T)
    gram = gram + 1e-6 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    value = torch.linalg.eigh(gram)[0].clamp_min(0).sqrt().sum()
    torch.linalg.eigh(gram.detach())
    return value


def _published_spectral(weight: Tensor, iterations: int = 50) -> Tensor:
    """‖M‖_F² / ‖M‖_2² with the largest singular vector by power iteration, held in the backward pass."""
    w = weight.float()
    with torch.no_grad():
        v = torch.randn(w.shape[1], device=w.device)
        for _ in range(iterations):
            v = nn.functional.normalize(w.T @ (w @ v), dim=0)
    return torch.trace(w.T @ w) / (w @ v).square().sum()


def _first_block(layers: Mapping[str, DenseLinear]) -> dict[str, DenseLinear]:
    """The layers whose names hold the first block's number."""
    return {name: layer for name, layer in layers.items() if "0" in name.split(".")}


def _bert(options: dict[str, Any]) -> tuple[nn.Module, Batch]:
    sizes = {} if options["blocks"] is None else {"num_hidden_layers": options["blocks"]}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2, **sizes))
    ids = torch.randint(0, 30_000, (options["bert_batch"], 128))
    labels = torch.randint(0, 2, (options["bert_batch"],))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _vit(options: dict[str, Any]) -> tuple[nn.Module, Batch]:
    sizes = {} if options["blocks"] is None else {"num_hidden_layers": options["blocks"]}
    classes = {index: str(index) for index in range(1000)}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(id2label=classes, **sizes))
    pixels = torch.randn(options["vit_batch"], 3, 224, 224)
    return model, {"pixel_values": pixels, "labels": torch.randint(0, 1000, (options["vit_batch"],))}


if __name__ == "__main__":
    main()
