"""The models that a fit makes: cut, exported, quantised and judged, each published by itself."""

import json
import shutil
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from converters.dtypes import DTYPES, cast_weights, holds_exactly
from converters.folder import save_folder
from converters.lowrank import dense_weight
from converters.onnx.modes import FILE_NAMES
from converters.onnx.quantize import quantize_graph
from converters.onnx.quantized_weights import count_quantized
from prehab_export.compression import (
    Calibrated,
    Decompositions,
    RankPlan,
    Samplesets,
    compress,
    decompose_layers,
    frozen_copy,
)
from prehab_export.config import drop_of
from prehab_export.deployment import reloaded, tell_quantized
from prehab_export.inputs import Metrics
from prehab_export.pipeline.fitting.published import Published
from prehab_export.pipeline.fitting.search import FLOAT32, Layers
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.stages.export import export_model
from prehab_export.pipeline.stages.quantize import activation_sample
from prehab_export.pipeline.stages.table import STAGES
from prehab_export.pipeline.stages.verify import graph_metrics
from prehab_export.system import bar, link, say, sha256_of_text, warn, write_json

Row = dict[str, Any]


class FitModels:
    """The models of one fit, dense and cut, by plan and kind of quantisation; each part is read where it is there and
    computed where it is not."""

    def __init__(self, session: Session) -> None:
        self.session, self.published = session, Published(session)
        self.modes = (FLOAT32, *dict.fromkeys(session.config.quantize))
        self._calibration = self.published.identity("calibrate")

    @cached_property
    def dense(self) -> RankPlan:
        """The plan that cuts nothing."""
        return RankPlan(dict.fromkeys(self.layers.shapes))

    @cached_property
    def model(self) -> PreTrainedModel:
        return self.session.load_dense()

    @cached_property
    def calibrated(self) -> Calibrated:
        return Calibrated(self.model, self.session.task, self.session.load_statistics("calibrate"))

    @cached_property
    def decomposed(self) -> Decompositions:
        return decompose_layers(self.calibrated, self.session.config.cut, progress=bar)

    @cached_property
    def layers(self) -> Layers:
        """Shapes and predicted losses; of the weights nothing is needed once these are known."""
        session, cut = self.session, self.session.config.cut
        folder = self.published.result("fit-spectra", self._cut_options(), [self._calibration], self._write_spectra)
        tensors, index = (
            load_file(folder / "losses.safetensors"),
            json.loads((folder / "index.json").read_text(encoding="utf-8")),
        )
        shapes = {name: dense_weight(layer).shape for name, layer in session.layers(session.empty_model).items()}
        losses = {tuple(names): tensors[str(at)] for at, names in enumerate(index)}
        return Layers(
            shapes={name: (shape[0], shape[1]) for name, shape in shapes.items()},
            losses={names[0]: values for names, values in losses.items() if len(names) == 1},
            joint={names: values for names, values in losses.items() if len(names) > 1},
            multiple=cut.multiple,
            floor_share=cut.floor_share,
        )

    def _write_spectra(self, folder: Path) -> None:
        single, joint = self.decomposed.losses
        entries = [((name,), values) for name, values in single.items()] + list(joint.items())
        save_file({str(at): x.cpu().contiguous() for at, (_, x) in enumerate(entries)}, folder / "losses.safetensors")
        write_json(folder / "index.json", [list(names) for names, _ in entries])

    def _made(self, plan: RankPlan) -> Path:
        """``model/`` with its graph, exported and reopened, of a plan that cuts something."""
        options = plan_facts(plan) | self._cut_options() | self._export_options()
        return self.published.result(
            f"fit-model-{slug_of(plan)}", options, [self._calibration], partial(self._make, plan)
        )

    def _cut_options(self) -> Row:
        """What decides the factors besides a plan's ranks: the options that choose the ranks are left out."""
        chooses_ranks = ("ratio", "budget", "allocation", "rank_multiple", "floor_share")
        return {name: value for name, value in asdict(self.session.config.cut).items() if name not in chooses_ranks}

    def _export_options(self) -> Row:
        """What decides the folder besides the factors, as of a run's own ``export``."""
        return dict(STAGES["export"].options(self.session.config))

    def _make(self, plan: RankPlan, folder: Path) -> None:
        session, config = self.session, self.session.config
        say(f"make a model of {len(plan_facts(plan)['ranks'])} cut layers", style="bold")
        samples = Samplesets(session.calibration, session.held_out, config.data.batch_size)
        result = compress(self.calibrated, samples, config.cut, decomposed=self.decomposed, plan=plan, progress=bar)
        for warning in result.warnings:
            warn(warning)
        model = cast(PreTrainedModel, frozen_copy(self.model))
        result.truncation.apply(model)
        model.cpu()
        export_model(session.on_cpu, model, folder)
        reloaded(folder, session.on_cpu.task, trust_remote_code=config.trust_remote_code)

    def graph(self, plan: RankPlan, mode: str) -> Path:
        """The ONNX graph of a plan in a mode."""
        return self._graph(plan, mode)[1]

    def graph_identity(self, plan: RankPlan, mode: str) -> str:
        """Of the result that holds the `graph`, for the keys of what is measured of it."""
        return self.published.identity(self._graph(plan, mode)[0])

    def _graph(self, plan: RankPlan, mode: str) -> tuple[str, Path]:
        """The stage that holds a graph, and the graph."""
        slug = slug_of(plan)
        if mode != FLOAT32:
            stage, parents = f"fit-graph-{slug}-{mode}", [self._calibration, self.graph_identity(plan, FLOAT32)]
            folder = self.published.result(stage, {"mode": mode}, parents, partial(self._quantize, plan, mode))
            return stage, folder / FILE_NAMES[mode]
        if slug == "dense":
            return "baseline", self.session.workspace.folder("baseline") / "onnx" / "model.onnx"
        return f"fit-model-{slug}", self._made(plan) / "model" / "onnx" / "model.onnx"

    def _quantize(self, plan: RankPlan, mode: str, folder: Path) -> None:
        source = self.graph(plan, FLOAT32)
        graph = folder / FILE_NAMES[mode]
        quantize_graph(source, graph, mode, partial(activation_sample, self.session.on_cpu, source))
        tell_quantized(f"{slug_of(plan)} {mode}", count_quantized(source, graph))

    def metrics(self, plan: RankPlan, mode: str, split: str = "evaluation") -> Metrics:
        """Of the graph, on ONNX Runtime."""
        name = f"fit-{split}-{slug_of(plan)}-{mode}"
        judging = {"evaluation": self.session.data.evaluation_fingerprint} if split == "evaluation" else {}
        options = {"split": split, **judging}
        folder = self.published.result(
            name, options, [self.graph_identity(plan, mode)], partial(self._evaluate, plan, mode, split)
        )
        return Metrics(**json.loads((folder / "metrics.json").read_text(encoding="utf-8")))

    def _evaluate(self, plan: RankPlan, mode: str, split: str, folder: Path) -> None:
        session = self.session.on_cpu
        samples = session.data.evaluation if split == "evaluation" else session.held_out
        description = f"{slug_of(plan)} {mode}, {split}"
        write_json(
            folder / "metrics.json", asdict(graph_metrics(session, self.graph(plan, mode), description, samples))
        )

    def drop(self, plan: RankPlan, mode: str) -> float:
        """What is lost against the dense float32 graph, on the evaluation split."""
        dense, own = self.metrics(self.dense, FLOAT32), self.metrics(plan, mode)
        return drop_of(dense.metric, dense.value, own.value)

    def write_folder(self, plan: RankPlan, mode: str, folder: Path) -> None:
        """The deployable folder of a plan: ``onnx/`` holds the graph that was measured."""
        session = self.session.on_cpu
        if slug_of(plan) == "dense":
            model, dtype = session.load_dense(), DTYPES[session.artifact_dtype]
            if holds_exactly(model, dtype):  # not after a merge, say: the graph is not of rounded weights
                cast_weights(model, dtype)
            save_folder(model, folder, session.fresh_processor())
            shutil.copytree(self.graph(plan, FLOAT32).parent, folder / "onnx", copy_function=link)
        else:
            shutil.copytree(self._made(plan) / "model", folder, copy_function=link)
        if mode != FLOAT32:
            quantised = self.graph(plan, mode).parent
            shutil.copytree(quantised, folder / "onnx", copy_function=link, dirs_exist_ok=True)


def slug_of(plan: RankPlan) -> str:
    """A plan's short name: ``dense``, or a hash of its ranks."""
    facts = plan_facts(plan)
    return sha256_of_text(json.dumps(facts))[:10] if facts["ranks"] else "dense"


def plan_facts(plan: RankPlan) -> Row:
    ranks = {name: rank for name, rank in sorted(plan.ranks.items()) if rank is not None}
    return {"ranks": ranks, "shared": sorted(list(group) for group in plan.shared)}
