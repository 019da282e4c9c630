"""Accuracy against share removed: every recipe at every ratio on one model, the same steps for all that train.

    python benchmarks/quality.py MODEL --task TASK --data DATA --eval-split test --ratio 0.8 --ratio 0.9 \
        --recipe svd-llm --recipe drift --recipe full --steps 200 --seeds 3 --out benchmarks/results/NAME.json

A recipe is what happens before the cut, the cut, and what happens after it. Rows already in the output file are not
computed again, so a benchmark that was stopped goes on, more recipes, ratios or seeds can be asked for later, and
several processes may fill in one file.
"""

import copy
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import torch
from filelock import FileLock
from pat import pat
from torch import nn

import prehab_export as px
from converters.onnx.export import export_onnx
from converters.onnx.form import GraphForm
from converters.onnx.quantize import quantize_graph
from converters.onnx.runtime import open_session
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.calibration import Gather
from prehab_export.compression.closed_form import Samplesets, compress
from prehab_export.compression.decompositions import Decompositions, decompose_layers
from prehab_export.compression.factored import Factored
from prehab_export.compression.refinement import refine
from prehab_export.compression.spool import Folders
from prehab_export.compression.training import Trainable, frozen_copy, labelled_loss, train
from prehab_export.config.training import RefineConfig, RefineSchedule
from prehab_export.inputs.data.samples import Samples
from prehab_export.inputs.devices import choose_device, prepare_determinism
from prehab_export.inputs.evaluation import onnx_predictor, torch_predictor
from prehab_export.pipeline.session import held_out_split, quiet_libraries
from prehab_export.pipeline.sweep_methods import METHODS
from prehab_export.system.machine import machine_facts
from prehab_export.system.progress import named
from prehab_export.system.terminal import bar, say


@dataclass(frozen=True)
class Recipe:
    """before: ``task`` (the control: task loss and distillation), ``prehab``, or a proximal map of torchao's PAT.
    cut: a sweep method, None to stay dense. after: ``lora``, ``factors``, ``all`` or ``refine``. early: share of the
    steps that go first."""

    cut: str | None
    before: str | None = None
    after: str | None = None
    early: float = 0.5

    def steps(self, total: int) -> tuple[int, int]:
        """Steps before and after the cut."""
        share = {(False, False): 0.0, (True, False): 1.0, (False, True): 0.0, (True, True): self.early}
        first = round(total * share[self.before is not None, self.after is not None])
        return first, total - first if self.after else 0

    @property
    def trains(self) -> bool:
        return self.before is not None or self.after is not None


RECIPES = {
    "dense": Recipe(None),
    "task": Recipe(None, before="task"),
    "prehab": Recipe(None, before="prehab"),
    "svd": Recipe("svd"),
    "svd-llm": Recipe("svd-llm"),
    "fisher-uniform": Recipe("fisher-uniform"),
    "fisher": Recipe("fisher"),
    "drift": Recipe("drift"),
    "svd-llm + lora": Recipe("svd-llm", after="lora"),
    "task + svd-llm": Recipe("svd-llm", before="task"),
    "prehab + svd-llm": Recipe("svd-llm", before="prehab"),
    "prehab + svd-llm + lora": Recipe("svd-llm", before="prehab", after="lora"),
    "pat rank + svd": Recipe("svd", before="MinRankConstraint"),
    "pat rank + svd-llm": Recipe("svd-llm", before="MinRankConstraint"),
    "pat nuclear + svd-llm": Recipe("svd-llm", before="ProxNuclearNorm"),
    "refined": Recipe("drift", after="refine"),
    "full": Recipe("drift", after="factors"),
    "full, all weights": Recipe("drift", after="all"),
    "refined cut, full": Recipe("refined", after="factors"),
    "prehab + drift": Recipe("drift", before="prehab"),
    "task + refined cut": Recipe("refined", before="task"),
    "prehab + refined cut": Recipe("refined", before="prehab"),
    "prehab 75% + full": Recipe("drift", before="prehab", after="factors", early=0.75),
    "prehab 50% + full": Recipe("drift", before="prehab", after="factors", early=0.5),
    "prehab 25% + full": Recipe("drift", before="prehab", after="factors", early=0.25),
}


@dataclass(frozen=True)
class Options:
    """What all rows of one file have in common. lr: peak rate before the cut; tune_lr and lora_lr: after it.
    refine_*: of the label-free steps that belong to a refined cut; refine_on: ``calibration``, that sample alone, or
    ``training``, the inputs of all training samples, as the program does."""

    steps: int = 150
    batch_size: int = 64
    lr: float = 3e-4
    tune_lr: float = 1e-3
    lora_lr: float = 1e-3
    distill: float = 0.5
    surrogate: str = px.PrehabConfig.surrogate
    strength: float = px.PrehabConfig.strength
    whitening: str = px.PrehabConfig.whitening
    schedule: str = px.PrehabConfig.schedule
    update: str = px.PrehabConfig.update
    layer_weights: str = px.PrehabConfig.layer_weights
    refresh_every: int = px.PrehabConfig.refresh_every
    calibration_samples: int = 512
    fisher_labels: str = "data"
    precision: str = "float32"
    include: Sequence[str] = ()
    eigenbasis: bool = True
    refine_steps: int = 128
    refine_batch_size: int = 8
    refine_lr: float = 5e-4
    refine_on: str = "calibration"

    def __post_init__(self) -> None:
        object.__setattr__(self, "include", tuple(self.include))  # JSON has lists


class Bench:
    """One model, its data, and what is asked of it. What several rows need is computed once."""

    def __init__(
        self, model: Any, task: Any, data: px.DataConfig, options: Options, processor: Any, int8: bool = False
    ) -> None:
        self.model, self.task, self.options, self.int8 = model, task, options, int8
        self.evaluation_batch = data.batch_size
        self.data = px.load_data(data, task, processor, model.config, seed=0)
        self.held_out, self.training = held_out_split(self.data.train, 0)
        self.processor = processor
        self.use_calibration(self.training.subset(min(options.calibration_samples, len(self.training)), 0))

    def use_calibration(self, samples: Samples) -> None:
        """Calibrate on these from now on."""
        self.calibration = samples
        self.__dict__.pop("statistics", None)
        self.decomposed: tuple[str, Decompositions] = ("", Decompositions({}))
        self.control: tuple[tuple[int, int], nn.Module, dict[str, Any], px.Statistics | None] | None = None
        self.last_cut: tuple[tuple[str, float], nn.Module, dict[str, Any]] | None = None

    @cached_property
    def statistics(self) -> px.Statistics:
        return self.calibrated(self.model)

    def calibrated(self, model: nn.Module) -> px.Statistics:
        batches, gather = self.calibration.batches(self.evaluation_batch), Gather(labels=self.options.fisher_labels)
        layers = self.layers(model)
        return px.calibrate(model, self.task, batches, layers, gather=gather, progress=bar).statistics

    def metric(self, model: nn.Module, samples: Samples | None = None) -> dict[str, Any]:
        batches = (samples or self.data.evaluation).batches(self.evaluation_batch)
        return asdict(px.evaluate(torch_predictor(model, self.task), self.task, batches, progress=bar))

    def metric_in_int8(self, model: Any) -> dict[str, Any]:
        """After ONNX Runtime's dynamic quantisation of the exported graph: weights and activations in int8."""
        with tempfile.TemporaryDirectory() as folder:
            plain, quantised = Path(folder, "plain.onnx"), Path(folder, "int8.onnx")
            names = None if self.task.name == "image-classification" else self.processor.model_input_names
            export_onnx(model, self.task.name, plain, GraphForm(text_inputs=names))
            session = open_session(quantize_graph(plain, quantised, "int8"), torch.get_num_threads())
            batches = self.data.evaluation.batches(self.evaluation_batch)
            return asdict(px.evaluate(onnx_predictor(session, self.task), self.task, batches))

    def layers(self, model: nn.Module) -> dict[str, Any]:
        return px.select_layers(model, self.options.include)

    def row(self, name: str, ratio: float, seed: int) -> dict[str, Any]:
        """One recipe at one ratio: the metric, what it took, and how it was trained."""
        recipe = RECIPES[name]
        early, late = recipe.steps(self.options.steps)
        started = time.monotonic()
        torch.manual_seed(seed)
        model, facts, statistics = self.prepared(recipe, ratio, early, seed)
        cut: dict[str, Any] = {}
        if recipe.cut and early:
            facts["before_the_cut"] = self.metric(model)
        if recipe.cut:
            statistics = statistics or self.calibrated(model)
            model, cut = self.cut(model, statistics, recipe.cut, ratio)
        if late:
            facts |= self.trained(model, statistics, recipe, late, seed)
        seconds = time.monotonic() - started
        result = {"recipe": name, "ratio": ratio, "seed": seed, "steps": early + late, "seconds": seconds}
        if self.int8:
            facts["int8"] = self.metric_in_int8(model)
        return result | self.metric(model) | cut | facts

    def prepared(
        self, recipe: Recipe, ratio: float, steps: int, seed: int
    ) -> tuple[nn.Module, dict[str, Any], px.Statistics | None]:
        """What is to be cut, how it was trained, and its moments where they are known by now. The control knows
        nothing of the cut that follows: it is trained once a seed, whatever the ratios."""
        if not steps:
            return self.model, {}, self.statistics if recipe.cut else None
        if recipe.before != "task":
            return *self.tuned(recipe, ratio, steps, seed), None
        if self.control is None or self.control[0] != (steps, seed):
            model, facts = self.tuned(recipe, ratio, steps, seed)
            self.control = (steps, seed), model, facts, self.calibrated(model) if recipe.cut else None
        return self.control[1], dict(self.control[2]), self.control[3]

    def cut(
        self, model: nn.Module, statistics: px.Statistics, method: str, ratio: float
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The model, compressed; the given one is left alone. Seeds of one recipe share the cut of the dense model."""
        if model is not self.model:
            return self._cut(model, statistics, method, ratio)
        if self.last_cut is None or self.last_cut[0] != (method, ratio):
            self.last_cut = ((method, ratio), *self._cut(model, statistics, method, ratio))
        return copy.deepcopy(self.last_cut[1]), self.last_cut[2]

    def _cut(
        self, model: nn.Module, statistics: px.Statistics, method: str, ratio: float
    ) -> tuple[nn.Module, dict[str, Any]]:
        base = px.TruncateConfig(ratio=ratio)
        config, calibrated = METHODS[method].at(ratio, base), Calibrated(model, self.task, statistics)
        samples = Samplesets(self.calibration, self.held_out, self.evaluation_batch)
        decomposed = None
        if model is self.model:
            if self.decomposed[0] != config.objective:  # one decomposition a layer serves every ratio
                self.decomposed = (config.objective, decompose_layers(calibrated, config, keep=Folders()))
            decomposed = self.decomposed[1]
        result = compress(calibrated, samples, config, decomposed=decomposed, progress=bar)
        facts = {"predicted_loss_increase": result.truncation.summary()["predicted_loss_increase"]}
        student = result.truncation.apply(copy.deepcopy(model))
        if METHODS[method].refined:
            options = self.options
            schedule = RefineSchedule(options.refine_steps, options.refine_batch_size, options.refine_lr)
            self.refined(student, self.teacher(model), statistics, schedule, seed=0)
            facts["refined"] = asdict(schedule) | self.metric(student)
        return student, facts

    def tuned(self, recipe: Recipe, ratio: float, steps: int, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """A copy of the dense model after prehab, or after as many steps without the regulariser."""
        model, options = copy.deepcopy(self.model), self.options
        training = px.TrainConfig(
            steps=steps, batch_size=options.batch_size, learning_rate=options.lr, distill=options.distill
        )
        progress = named(bar, f"{recipe.before} {ratio:g}")
        loss = labelled_loss(self.task, self.model, options.distill)
        if recipe.before == "task":
            trainable = Trainable(model, list(model.parameters()), precision=self.task.precision)
            history = train(trainable, self.training, training, loss, seed=seed, progress=progress)
        elif recipe.before != "prehab":
            history = pat(model, self.layers(model), self.training, training, loss, ratio, str(recipe.before), seed)
        else:
            config = px.PrehabConfig(
                train=training,
                surrogate=options.surrogate,
                strength=options.strength,
                whitening=options.whitening,
                schedule=options.schedule,
                update=options.update,
                layer_weights=options.layer_weights,
                refresh_every=options.refresh_every,
            )
            calibrated = Calibrated(model, self.task, self.statistics)
            truncation = METHODS[recipe.cut or "svd-llm"].at(ratio, px.TruncateConfig())
            history = px.prehab(calibrated, self.training, config, truncation, seed=seed, progress=progress)
        return model, {"early": _thinned(history)}

    def teacher(self, prepared: nn.Module) -> nn.Module:
        """What a cut of ``prepared`` is to follow, as in the program: that, or the dense model if it is better."""
        if prepared is self.model:
            return self.model
        models = (self.model, frozen_copy(prepared))
        return min(models, key=lambda model: self.metric(model, self.held_out)["loss"])

    def refined(
        self, model: nn.Module, teacher: nn.Module, statistics: px.Statistics, schedule: RefineSchedule, seed: int
    ) -> list[dict[str, float]]:
        """Tune the compressed model in place to do what ``teacher`` does, without labels."""
        samples = self.training if self.options.refine_on == "training" else self.calibration
        factored = self.factored(model, statistics, self.options.eigenbasis)
        return refine(factored, samples, RefineConfig(schedule), teacher=teacher, seed=seed, progress=bar)

    def factored(self, model: nn.Module, statistics: px.Statistics, eigenbasis: bool) -> Factored:
        return Factored.of(model, self.task, statistics) if eigenbasis else Factored(model, self.task)

    def trained(
        self, model: nn.Module, statistics: px.Statistics, recipe: Recipe, steps: int, seed: int
    ) -> dict[str, Any]:
        """Train the compressed model in place."""
        options = self.options
        rate = options.lora_lr if recipe.after == "lora" else options.tune_lr
        schedule = {"steps": steps, "batch_size": options.batch_size, "learning_rate": rate}
        if recipe.after == "refine":
            before = self.metric(model, self.held_out)["loss"]
            history = self.refined(model, self.model, statistics, RefineSchedule(**schedule), seed)
            after = self.metric(model, self.held_out)["loss"]
            return {"late": _thinned(history), "held_out_loss_before": before, "held_out_loss_after": after}
        result = px.rehab(
            self.factored(model, statistics, options.eigenbasis and recipe.after != "lora"),
            self.training,
            px.RehabConfig(px.TrainConfig(**schedule, distill=options.distill), method=recipe.after or "factors"),
            held_out_loss=lambda candidate: self.metric(candidate, self.held_out)["loss"],
            teacher=self.model if options.distill else None,
            seed=seed,
            progress=named(bar, f"{recipe.after}"),
        )
        return {"late": _thinned(result.history), "parts": result.parts}


def _thinned(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Every tenth row: enough to draw."""
    return [row for row in history if row["step"] % 10 == 0]


def wanted(recipes: tuple[str, ...], ratios: tuple[float, ...], seeds: int) -> Iterator[tuple[str, float, int]]:
    """What does not train has one seed. Grouped so that decompositions, cuts and controls are used again."""
    for recipe in recipes:
        own = range(seeds if RECIPES[recipe].trains else 1)
        if RECIPES[recipe].before == "task":
            yield from ((recipe, ratio, seed) for seed in own for ratio in ratios)
        else:
            yield from ((recipe, ratio, seed) for ratio in ratios for seed in own)


@click.command(help=__doc__)
@click.argument("model")
@click.option("--task", required=True)
@click.option("--data", required=True)
@click.option("--data-config")
@click.option("--train-split")
@click.option("--eval-split")
@click.option("--eval-samples", type=int, default=10**6, show_default="all")
@click.option("--sequence-length", type=int)
@click.option("--evaluation-batch", type=int, default=32)
@click.option("--recipe", "recipes", type=click.Choice(list(RECIPES)), multiple=True, required=True)
@click.option("--ratio", "ratios", type=float, multiple=True, required=True)
@click.option("--seeds", type=int, default=1)
@click.option("--steps", type=int, default=Options.steps)
@click.option("--batch-size", type=int, default=Options.batch_size)
@click.option("--lr", type=float, default=Options.lr, help="Peak rate before the cut.")
@click.option("--tune-lr", type=float, default=Options.tune_lr, help="Peak rate after the cut, of factors.")
@click.option("--lora-lr", type=float, default=Options.lora_lr, help="Peak rate after the cut, of LoRA.")
@click.option("--distill", type=float, default=Options.distill)
@click.option("--surrogate", default=Options.surrogate)
@click.option("--prehab-lambda", "strength", type=float, default=Options.strength)
@click.option("--whitening", default=Options.whitening)
@click.option("--schedule", default=Options.schedule)
@click.option("--update", default=Options.update)
@click.option("--layer-weights", default=Options.layer_weights)
@click.option("--refresh-every", type=int, default=Options.refresh_every)
@click.option("--calibration-samples", type=int, default=Options.calibration_samples)
@click.option("--fisher-labels", default=Options.fisher_labels)
@click.option("--refine-steps", type=int, default=Options.refine_steps, help="Label-free steps of a refined cut.")
@click.option("--refine-batch-size", type=int, default=Options.refine_batch_size)
@click.option("--refine-lr", type=float, default=Options.refine_lr, help="Peak rate of those steps.")
@click.option("--refine-on", type=click.Choice(["calibration", "training"]), default=Options.refine_on)
@click.option("--threads", type=int, default=2)
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--include", multiple=True, help="Only these layers; all of the blocks by default.")
@click.option("--eigenbasis/--no-eigenbasis", default=True, help="Coordinates that factors are tuned in.")
@click.option("--int8", is_flag=True, help="Measure each model after dynamic quantisation too.")
@click.option("--precision", default=Options.precision, help="Of forward passes.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    model: str,
    task: str,
    recipes: tuple[str, ...],
    ratios: tuple[float, ...],
    seeds: int,
    threads: int,
    device: str,
    evaluation_batch: int,
    int8: bool,
    out: Path,
    **rest: Any,
) -> None:
    torch.set_num_threads(threads)
    quiet_libraries()
    data = {key: rest.pop(key) for key in ("data", "data_config", "train_split", "eval_split", "eval_samples")}
    data |= {"sequence_length": rest.pop("sequence_length"), "batch_size": evaluation_batch}
    options = Options(**rest)
    place = choose_device(device, options.precision)
    if place.type == "cuda":
        prepare_determinism()
    chosen = px.TASKS[task].at(options.precision)
    dense = nn.Module.to(px.load_model(model, chosen), place)
    bench = Bench(dense, chosen, px.DataConfig(**data), options, px.load_processor(model, chosen), int8)
    machine = machine_facts() | {"gpu": torch.cuda.get_device_name(place) if place.type == "cuda" else None}
    command = shlex.join(["python", "benchmarks/quality.py", *sys.argv[1:]])
    with results(out, {"commands": [], "machine": machine, "options": asdict(options), "rows": []}) as result:
        if Options(**result["options"]) != options:
            raise px.InputError(f"{out} was made with other options; give another file")
        result["commands"].append(command)
        result.setdefault("dense", bench.metric(dense))
    for key in wanted(recipes, ratios, seeds):
        with results(out) as result:
            done = {(row["recipe"], row["ratio"], row["seed"]) for row in result["rows"]}
        if key not in done:
            row = bench.row(*key)
            say(f"{key}: {row['value']:.4f} (loss {row['loss']:.4f}) in {row['seconds']:.0f} s")
            with results(out) as result:
                result["rows"].append(row)


@contextmanager
def results(out: Path, fresh: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """What the file holds, or ``fresh`` if there is none; written back at the end. One process at a time."""
    with FileLock(out.with_suffix(".lock")):
        result = json.loads(out.read_text()) if out.exists() else fresh or {}
        yield result
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
