"""What the stages of one run share: the checked request, the data, and where each stage finds the model so far."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from converters.coverage import Coverage, coverage
from converters.folder import from_pretrained
from converters.lowrank import DenseLinear
from converters.selection import select_layers
from prehab_export.compression import Calibrated, Statistics, load_statistics
from prehab_export.config import AUTO, RunConfig
from prehab_export.inputs import (
    TASKS,
    Metrics,
    Samples,
    Task,
    TaskData,
    WeightFiles,
    check_task,
    choose_device,
    empty_model,
    evaluate,
    fingerprint,
    load_config,
    load_data,
    load_model,
    load_processor,
    prepare_determinism,
    room_for,
    torch_predictor,
    weight_files,
)
from prehab_export.linalg import Cost, parameters
from prehab_export.measurement import RankTimes
from prehab_export.pipeline.workspace import READ_FILES, Workspace
from prehab_export.system import DigestCache, bar, named

# Training text or images put aside, to decide what is kept; never trained on and never reported on.
HELD_OUT = 512
# Moments, in the folders of the stages that gather them.
STATISTICS = "statistics.safetensors"
# What ranks take on this machine, in the folder of the stage that measures it.
TIMES = "times.json"


@dataclass(frozen=True)
class Session:
    """One run at work. Everything here is read from disk on first use, so that a resumed run sees the same."""

    config: RunConfig
    workspace: Workspace

    @property
    def threads(self) -> int:
        return self.config.bench.threads

    @property
    def task(self) -> Task:
        """At the run's precision."""
        return TASKS[self.config.task].at(self.config.precision)

    @cached_property
    def device(self) -> torch.device:
        """Where models and moments are loaded to.

        Raises:
            InputError: there is no such device here, or it cannot compute in the run's precision.
        """
        return choose_device(self.config.device, self.config.precision)

    @cached_property
    def on_cpu(self) -> "Session":
        """The same run on the CPU in float32: whatever is published is made, checked and measured there."""
        if (self.device.type, self.config.precision) == ("cpu", "float32"):
            return self
        twin = replace(self, config=replace(self.config, device="cpu", precision="float32"))
        twin.__dict__["data"] = self.data  # the same on every device, and slow to read
        return twin

    @property
    def _origin(self) -> dict[str, Any]:
        return {"revision": self.config.revision, "trust_remote_code": self.config.trust_remote_code}

    @cached_property
    def model_config(self) -> Any:
        config = load_config(self.config.model, **self._origin)
        check_task(config, self.task)
        return config

    @cached_property
    def processor(self) -> Any:
        return self.fresh_processor()

    def fresh_processor(self) -> Any:
        """As stored, to be saved again: a tokenizer that has been used remembers how, and would be saved with that."""
        return load_processor(self.config.model, self.task, **self._origin)

    @cached_property
    def data(self) -> TaskData:
        return load_data(
            self.config.data,
            self.task,
            self.processor,
            self.model_config,
            seed=self.config.seed,
            trust_remote_code=self.config.trust_remote_code,
            sha256_of=self.digests.sha256_of,
        )

    @cached_property
    def source(self) -> dict[str, Any]:
        """What the run starts from, by content: model, adapter, training data, task and seed; whose code."""
        adapter = self.config.adapter
        source = {
            "model": fingerprint(self.config.model, revision=self.config.revision, sha256_of=self.digests.sha256_of),
            "adapter": None if adapter is None else self._folder_hash(Path(adapter)),
            # Of a model that transformers knows and that brings its own code too, this decides which of the two runs.
            "own_code": self.config.trust_remote_code,
            "data": self.data.fingerprint,
            "task": self.config.task,
            "seed": self.config.seed,
            "batch_size": self.config.data.batch_size,
        }
        if self.workspace.writable:
            self.digests.save()
        return source

    @cached_property
    def digests(self) -> DigestCache:
        """Hashes of the files that the run reads, remembered from one command to the next."""
        return DigestCache(self.workspace.root / READ_FILES)

    def _folder_hash(self, folder: Path) -> dict[str, str]:
        return {path.name: self.digests.sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}

    def identity(self, stage: str) -> str:
        """What was asked of a stage and what it made, for the keys of what reads its current result."""
        return self.workspace.identity(stage, self.workspace.current[stage])

    @cached_property
    def _parts(self) -> tuple[Samples, Samples]:
        return held_out_split(self.data.train, self.config.seed)

    @property
    def held_out(self) -> Samples:
        return self._parts[0]

    @property
    def training(self) -> Samples:
        return self._parts[1]

    @property
    def calibration(self) -> Samples:
        wanted = min(self.config.calibrate.samples, len(self.training))
        return self.training.subset(wanted, self.config.seed)

    @cached_property
    def weights(self) -> WeightFiles:
        """The files that the given model is loaded from."""
        named = getattr(self.model_config, "transformers_weights", None)
        return weight_files(self.config.model, revision=self.config.revision, named=named)

    @property
    def artifact_dtype(self) -> str:
        """What the artifact's weights are rounded to."""
        return self.weights.kept_dtype if self.config.dtype == AUTO else self.config.dtype

    @cached_property
    def coverage(self) -> Coverage:
        """What the selected layers hold of the dense model."""
        return coverage(self.empty_model, self.layers(self.empty_model))

    @cached_property
    def empty_model(self) -> PreTrainedModel:
        """The dense model without weights."""
        return empty_model(self.model_config, self.task, trust_remote_code=self.config.trust_remote_code)

    def layers(self, model: nn.Module) -> dict[str, DenseLinear]:
        return select_layers(model, self.config.calibrate.include, self.config.calibrate.exclude)

    def load_source_model(self) -> PreTrainedModel:
        return load_model(self.config.model, self.task, **self._origin)

    def load_dense(self) -> PreTrainedModel:
        """The dense model that everything is compared with: the given one, with its adapter merged.

        It is read in float32 on the CPU and then moved: 4 bytes a weight of the machine's memory (28 GB for 7B), and
        again of the device's. Truncation with drift correction needs two such models there, beside the moments.
        """
        if self.config.adapter is None:
            return self._placed(self.load_source_model())
        return self._load_stage("merge")

    def _load_stage(self, stage: str) -> PreTrainedModel:
        folder = self.workspace.folder(stage) / "model"
        return self._placed(load_model(str(folder), self.task, trust_remote_code=self.config.trust_remote_code))

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.to(self.device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature

    def load_prepared(self) -> tuple[PreTrainedModel, Statistics]:
        """The dense model to truncate and its moments: after prehab where that ran and was kept."""
        model = self._load_stage("prehab") if self._uses_prehab else self.load_dense()
        return model, self.load_prepared_statistics()

    def load_teacher(self) -> tuple[str, PreTrainedModel]:
        """What the compressed model is to follow, frozen, and its name: ``dense``, or ``prehab`` where that was kept
        and has the lower held-out loss. What prehab has learned is then not unlearned after truncation; what it has
        cost is."""
        models = {"dense": self.load_dense()}
        if self._uses_prehab:
            models["prehab"] = self._load_stage("prehab")
        name = min(models, key=lambda name: self.held_out_loss(models[name])) if len(models) > 1 else "dense"
        return name, models[name].requires_grad_(False)

    def load_prepared_statistics(self) -> Statistics:
        """The moments of the model that is truncated."""
        return self.load_statistics("prehab" if self._uses_prehab else "calibrate")

    @property
    def _uses_prehab(self) -> bool:
        wanted = self.config.prehab.train.steps > 0
        return wanted and self.workspace.read_json("prehab", "prehab.json")["kept"]

    def calibrated(self, model: nn.Module, statistics: Statistics) -> Calibrated:
        """A dense model of the run with moments of it, and what the run's budget is counted in."""
        return Calibrated(model, self.task, statistics, self.cost)

    @cached_property
    def cost(self) -> Cost:
        """What the budget of ranks is counted in: parameters, or measured seconds."""
        if self.config.cut.latency is None:
            return parameters
        return RankTimes.from_json(self.workspace.read_json("times", TIMES)).cost

    def load_statistics(self, stage: str) -> Statistics:
        """The moments that a stage gathered."""
        path = self.workspace.folder(stage) / STATISTICS
        return load_statistics(path, room_for(path.stat().st_size, self.device))

    def factored_folder(self) -> Path:
        """The compressed model as the last of truncation, refinement and rehab left it."""
        steps = {"rehab": self.config.rehab.train.steps, "refine": self.config.refine.schedule.steps}
        stage = next((name for name, count in steps.items() if count), "truncate")
        return self.workspace.folder(stage) / "model"

    def load_factored(self, stage: str) -> PreTrainedModel:
        folder = self.workspace.folder(stage) / "model"
        return self._placed(from_pretrained(folder, trust_remote_code=self.config.trust_remote_code))

    def metrics(self, model: nn.Module, samples: Samples, description: str) -> Metrics:
        """Of the model where it lies, in the run's precision."""
        batches = samples.batches(self.config.data.batch_size)
        return evaluate(torch_predictor(model, self.task), self.task, batches, progress=named(bar, description))

    def held_out_loss(self, model: nn.Module) -> float:
        return self.metrics(model, self.held_out, "held-out loss").loss


def held_out_split(train: Samples, seed: int) -> tuple[Samples, Samples]:
    """Samples to decide by (at most ``HELD_OUT``, or a fifth), and the rest, to calibrate and train on."""
    return train.split(min(HELD_OUT, max(1, len(train) // 5)), seed)


def prepare_process(config: RunConfig) -> None:
    """Threads and determinism, for every process that works on a run."""
    torch.set_num_threads(config.bench.threads)
    prepare_determinism()
    quiet_libraries()


def quiet_libraries() -> None:
    """What transformers has to say is for those who call it; this tool speaks for itself."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
