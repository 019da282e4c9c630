"""The session of a run, which gives its stages the options, the data and the models of earlier stages."""

import copy
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
from converters.onnx.runtime import open_session
from converters.selection import select_layers
from prehab_export.compression import USUAL_LIMITS, Calibrated, Folders, MemoryLimits, Statistics, load_statistics
from prehab_export.config import AUTO, RunConfig
from prehab_export.inputs import (
    TASKS,
    Batches,
    Metrics,
    Predict,
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
    onnx_predictor,
    prepare_determinism,
    room_for,
    torch_predictor,
    weight_files,
)
from prehab_export.linalg import Cost, parameters
from prehab_export.measurement import RankTimes
from prehab_export.pipeline.dense_graph import MissingDenseGraph
from prehab_export.pipeline.workspace import READ_FILES, Workspace
from prehab_export.system import DigestCache, bar, named

# The most training samples to hold out for decisions between candidates. They are never trained or reported on.
HELD_OUT = 512
# The file of moments in the results of the stages that gather them.
STATISTICS = "statistics"
# The file of measured rank times in the result of the stage ``times``.
TIMES = "times.json"


@dataclass(frozen=True)
class Session:
    """The state of one run in this process.

    Everything is read from disk on first use, so that a resumed run sees the same as an uninterrupted one.

    memory: limits on what work on samples holds in memory at once.
    missing_dense_graph: why the run is to have no graph of the dense model; None if it is to have one.
    """

    config: RunConfig
    workspace: Workspace
    memory: MemoryLimits = USUAL_LIMITS
    missing_dense_graph: MissingDenseGraph | None = None

    def within(self, memory: MemoryLimits) -> "Session":
        """Return the same session, with what it has read, under other limits."""
        return self._with("memory", memory)

    def without_dense_graph(self, missing: MissingDenseGraph | None) -> "Session":
        """Return the same session, with what it has read, for this reason without a dense graph; None gives it one."""
        return self._with("missing_dense_graph", missing)

    def _with(self, name: str, value: Any) -> "Session":
        session = copy.copy(self)
        object.__setattr__(session, name, value)
        session.__dict__.pop("on_cpu", None)  # it has the earlier value
        return session

    @property
    def folders(self) -> Folders:
        """Where work on samples puts what does not fit in memory: into the run's folder."""
        return Folders(self.workspace.root, limits=self.memory)

    @property
    def threads(self) -> int:
        return self.config.bench.threads

    @property
    def task(self) -> Task:
        """The run's task, at the run's precision."""
        return TASKS[self.config.task].at(self.config.precision)

    @cached_property
    def device(self) -> torch.device:
        """The device that models and moments are loaded to.

        Raises:
            InputError: this machine has no such device, or the device does not support the run's precision.
        """
        return choose_device(self.config.device, self.config.precision)

    @cached_property
    def on_cpu(self) -> "Session":
        """The same run on the CPU in float32, where everything published is made, checked and measured."""
        if (self.device.type, self.config.precision) == ("cpu", "float32"):
            return self
        session = replace(self, config=replace(self.config, device="cpu", precision="float32"))
        session.__dict__["data"] = self.data  # share the data, which is slow to read and does not depend on the device
        return session

    @property
    def _loading_options(self) -> dict[str, Any]:
        return {"revision": self.config.revision, "trust_remote_code": self.config.trust_remote_code}

    @cached_property
    def model_config(self) -> Any:
        config = load_config(self.config.model, **self._loading_options)
        check_task(config, self.task)
        return config

    @cached_property
    def processor(self) -> Any:
        return self.fresh_processor()

    def fresh_processor(self) -> Any:
        """Load the processor again, to save it. A used tokenizer would save its truncation and padding state."""
        return load_processor(self.config.model, self.task, **self._loading_options)

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
        """Fingerprints of the run's inputs: model, adapter, training data, task, seed, batch size and own code."""
        adapter = self.config.adapter
        source = {
            "model": fingerprint(self.config.model, revision=self.config.revision, sha256_of=self.digests.sha256_of),
            "adapter": None if adapter is None else self._folder_hash(Path(adapter)),
            # If both transformers and the model's folder have code for the model, this decides which one runs.
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
        """Hashes of the files that the run reads, cached from one command to the next."""
        return DigestCache(self.workspace.root / READ_FILES, bar)

    def _folder_hash(self, folder: Path) -> dict[str, str]:
        return {path.name: self.digests.sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}

    def identity(self, stage: str) -> str:
        """Return the identity of a stage's current result, for the keys of the stages that read it."""
        return self.workspace.identity(stage, self.workspace.current[stage])

    @cached_property
    def _train_split(self) -> tuple[Samples, Samples]:
        return held_out_split(self.data.train, self.config.seed)

    @property
    def held_out(self) -> Samples:
        """Training samples held out for decisions between candidates."""
        return self._train_split[0]

    @property
    def training(self) -> Samples:
        """The training samples that are not held out."""
        return self._train_split[1]

    @property
    def calibration(self) -> Samples:
        """A random subset of the training samples to gather moments on."""
        count = min(self.config.calibrate.samples, len(self.training))
        return self.training.subset(count, self.config.seed)

    @property
    def calibrated_samples(self) -> Samples:
        """The samples that the moments of the calibrate stage were gathered from, a part of ``calibration``."""
        return self.calibration.first(self.workspace.read_json("calibrate", "calibrate.json")["samples"])

    @cached_property
    def weights(self) -> WeightFiles:
        """The weight files of the source model."""
        file_name = getattr(self.model_config, "transformers_weights", None)
        return weight_files(self.config.model, revision=self.config.revision, named=file_name)

    @property
    def artifact_dtype(self) -> str:
        """The name of the artifact's dtype; the weights are rounded to it."""
        return self.weights.kept_dtype if self.config.dtype == AUTO else self.config.dtype

    @cached_property
    def coverage(self) -> Coverage:
        """The share of the dense model's parameters that the selected layers hold."""
        return coverage(self.empty_model, self.layers(self.empty_model))

    @cached_property
    def empty_model(self) -> PreTrainedModel:
        """The dense model without weights, on the meta device."""
        return empty_model(self.model_config, self.task, trust_remote_code=self.config.trust_remote_code)

    def layers(self, model: nn.Module) -> dict[str, DenseLinear]:
        """Return name → layer, for the layers of a model that the run compresses."""
        return select_layers(model, self.config.calibrate.include, self.config.calibrate.exclude)

    def load_source_model(self, dtype: torch.dtype | None = torch.float32) -> PreTrainedModel:
        """Load the model named in the options, without its adapter, on the CPU; ``dtype`` as in `load_model`."""
        return load_model(self.config.model, self.task, dtype=dtype, **self._loading_options)

    def load_dense(self, *, as_stored: bool = False) -> PreTrainedModel:
        """Load the dense model that the compressed one is compared with: the source model with its adapter merged.

        The model is read in float32 on the CPU and then moved to the device. It takes 4 bytes per weight (28 GB for 7B)
        in both memories.

        Args:
            as_stored: hold weights in half precision as they are stored, for all work but training. An export needs
                `GraphForm` with ``widen`` then.
        """
        dtype = None if as_stored else torch.float32
        if self.config.adapter is None:
            return self._to_device(self.load_source_model(dtype))
        return self._load_stage("merge", dtype)

    def _load_stage(self, stage: str, dtype: torch.dtype | None = torch.float32) -> PreTrainedModel:
        folder, trust = self.workspace.folder(stage) / "model", self.config.trust_remote_code
        return self._to_device(load_model(str(folder), self.task, dtype=dtype, trust_remote_code=trust))

    def _to_device(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.to(self.device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature

    def load_prepared(self) -> tuple[PreTrainedModel, Statistics]:
        """Load the dense model to truncate, as it is stored, and its moments; from prehab if its result was kept."""
        model = self._load_stage("prehab", None) if self._uses_prehab else self.load_dense(as_stored=True)
        return model, self.load_prepared_statistics()

    def load_teacher(self) -> tuple[str, PreTrainedModel]:
        """Load the frozen teacher for distillation: the dense model or, if its held-out loss is lower, prehab's.

        Following the better of the two keeps what prehab gained and makes up for what it lost.

        Returns:
            The teacher's name, ``dense`` or ``prehab``, and the model.
        """
        models = {"dense": self.load_dense()}
        if self._uses_prehab:
            models["prehab"] = self._load_stage("prehab")
        name = min(models, key=lambda name: self.held_out_loss(models[name])) if len(models) > 1 else "dense"
        return name, models[name].requires_grad_(False)

    def load_prepared_statistics(self) -> Statistics:
        """Load the moments of the model that is truncated."""
        return self.load_statistics("prehab" if self._uses_prehab else "calibrate")

    @property
    def _uses_prehab(self) -> bool:
        """Whether prehab ran and its result was kept."""
        is_enabled = self.config.prehab.train.steps > 0
        return is_enabled and self.workspace.read_json("prehab", "prehab.json")["kept"]

    def calibrated(self, model: nn.Module, statistics: Statistics) -> Calibrated:
        """Combine a dense model with its moments and the run's cost function."""
        return Calibrated(model, self.task, statistics, self.cost)

    @cached_property
    def cost(self) -> Cost:
        """The cost function of the rank budget, in parameters or in measured seconds."""
        if self.config.cut.latency is None:
            return parameters
        return RankTimes.from_json(self.workspace.read_json("times", TIMES)).cost

    def load_statistics(self, stage: str) -> Statistics:
        """Load the moments that a stage gathered."""
        path = self.workspace.folder(stage) / STATISTICS
        size = sum(file.stat().st_size for file in path.iterdir())
        return load_statistics(path, room_for(size, self.device))

    @property
    def dense_graph(self) -> Path | None:
        """The float32 graph of the dense model in the current result of ``baseline``; None if that has none."""
        graph = self.workspace.folder("baseline") / "onnx" / "model.onnx"
        return graph if graph.is_file() else None

    def factored_folder(self) -> Path:
        """Return the folder of the compressed model after the last of truncation, refinement and rehab."""
        steps = {"rehab": self.config.rehab.train.steps, "refine": self.config.refine.schedule.steps}
        stage = next((name for name, count in steps.items() if count), "truncate")
        return self.workspace.folder(stage) / "model"

    def load_factored(self, stage: str) -> PreTrainedModel:
        """Load the compressed model that a stage wrote."""
        folder = self.workspace.folder(stage) / "model"
        return self._to_device(from_pretrained(folder, trust_remote_code=self.config.trust_remote_code))

    def graph_metrics(self, graph: Path, description: str, samples: Samples | None = None) -> Metrics:
        """Evaluate a graph on ONNX Runtime, on the evaluation split or on these samples."""
        runtime = open_session(graph, threads=self.threads)
        batches = (self.data.evaluation if samples is None else samples).batches(self.config.data.batch_size)
        return self._evaluate(onnx_predictor(runtime, self.task), batches, description)

    def metrics(self, model: nn.Module, samples: Samples, description: str) -> Metrics:
        """Evaluate a model on its current device, in the run's precision."""
        batches = samples.batches(self.config.data.batch_size)
        return self._evaluate(torch_predictor(model, self.task), batches, description)

    def _evaluate(self, predict: Predict, batches: Batches, description: str) -> Metrics:
        positions = self.memory.positions if self.memory.positions < USUAL_LIMITS.positions else None
        return evaluate(predict, self.task, batches, positions=positions, progress=named(bar, description))

    def held_out_loss(self, model: nn.Module) -> float:
        return self.metrics(model, self.held_out, "held-out loss").loss


def held_out_split(train: Samples, seed: int) -> tuple[Samples, Samples]:
    """Split the training data into held-out samples (a fifth, at most ``HELD_OUT``) and samples to train on."""
    return train.split(min(HELD_OUT, max(1, len(train) // 5)), seed)


def prepare_process(config: RunConfig) -> None:
    """Set threads and determinism, and silence libraries; every process that works on a run calls this."""
    torch.set_num_threads(config.bench.threads)
    prepare_determinism()
    quiet_libraries()


def quiet_libraries() -> None:
    """Silence the log messages and progress bars of transformers, which are meant for its direct users."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
