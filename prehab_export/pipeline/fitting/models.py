"""The models that a fit makes, exports, quantises and evaluates. Each result is cached separately."""

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
from prehab_export.deployment import check_reloaded, tell_quantized
from prehab_export.inputs import Metrics
from prehab_export.pipeline.fitting.result_cache import ResultCache
from prehab_export.pipeline.fitting.search import FLOAT32, Layers
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.stages.export import export_model
from prehab_export.pipeline.stages.quantize import activation_sample
from prehab_export.pipeline.stages.table import STAGES
from prehab_export.system import bar, link, say, sha256_of_text, warn, write_json

Row = dict[str, Any]


class FitModels:
    """The dense and factored models of one fit, by plan and mode.

    A mode is ``float32`` or a kind of quantisation. Every result comes from the cache, or is computed and cached.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.cache = session, ResultCache(session)
        self.modes = (FLOAT32, *dict.fromkeys(session.config.quantize))
        self._calibration = self.cache.identity("calibrate")

    @cached_property
    def dense(self) -> RankPlan:
        """The plan in which every layer is dense."""
        return RankPlan(dict.fromkeys(self.layers.shapes))

    @cached_property
    def model(self) -> PreTrainedModel:
        return self.session.load_dense()

    @cached_property
    def calibrated(self) -> Calibrated:
        return Calibrated(self.model, self.session.task, self.session.load_statistics("calibrate"))

    @cached_property
    def decompositions(self) -> Decompositions:
        cut = self.session.config.cut
        keep = None if cut.corrects_drift else self.session.folders
        return decompose_layers(self.calibrated, cut, keep=keep, progress=bar)

    @cached_property
    def layers(self) -> Layers:
        """The shapes and predicted losses of the selected layers, cached so that later fits do not load the
        weights."""
        session, cut = self.session, self.session.config.cut
        folder = self.cache.get_or_compute("fit-spectra", self._cut_options(), [self._calibration], self._write_spectra)
        tensors = load_file(folder / "losses.safetensors")
        groups = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        shapes = {name: dense_weight(layer).shape for name, layer in session.layers(session.empty_model).items()}
        losses = {tuple(names): tensors[str(index)] for index, names in enumerate(groups)}
        return Layers(
            shapes={name: (shape[0], shape[1]) for name, shape in shapes.items()},
            losses={names[0]: values for names, values in losses.items() if len(names) == 1},
            joint_losses={names: values for names, values in losses.items() if len(names) > 1},
            rank_multiple=cut.multiple,
            floor_share=cut.floor_share,
        )

    def _write_spectra(self, folder: Path) -> None:
        single, joint = self.decompositions.losses
        entries = [((name,), values) for name, values in single.items()] + list(joint.items())
        tensors = {str(index): values.cpu().contiguous() for index, (_, values) in enumerate(entries)}
        save_file(tensors, folder / "losses.safetensors")
        write_json(folder / "index.json", [list(names) for names, _ in entries])

    def _model_result(self, plan: RankPlan) -> Path:
        """Return the result whose ``model/`` is the exported folder of a plan with factored layers, with its
        graph."""
        options = plan_facts(plan) | self._cut_options() | self._export_options()
        return self.cache.get_or_compute(
            f"fit-model-{slug_of(plan)}", options, [self._calibration], partial(self._make_model, plan)
        )

    def _cut_options(self) -> Row:
        """Return the options that determine the factors at given ranks, without the options that choose the ranks."""
        rank_options = ("ratio", "budget", "allocation", "rank_multiple", "floor_share")
        return {name: value for name, value in asdict(self.session.config.cut).items() if name not in rank_options}

    def _export_options(self) -> Row:
        """Return the options that determine the exported folder: the options of the stage ``export``."""
        return dict(STAGES["export"].options(self.session.config))

    def _make_model(self, plan: RankPlan, folder: Path) -> None:
        session, config = self.session, self.session.config
        say(f"make a model with {len(plan_facts(plan)['ranks'])} factored layers", style="bold")
        samples = Samplesets(session.calibrated_samples, session.held_out, config.data.batch_size, session.folders)
        result = compress(self.calibrated, samples, config.cut, decomposed=self.decompositions, plan=plan, progress=bar)
        for warning in result.warnings:
            warn(warning)
        model = cast(PreTrainedModel, frozen_copy(self.model))
        result.truncation.apply(model)
        model.cpu()
        export_model(session.on_cpu, model, folder)
        check_reloaded(folder, session.on_cpu.task, trust_remote_code=config.trust_remote_code)

    def graph(self, plan: RankPlan, mode: str) -> Path:
        """Return the ONNX graph of a plan in a mode."""
        return self._stage_and_graph(plan, mode)[1]

    def graph_identity(self, plan: RankPlan, mode: str) -> str:
        """Return the identity of the result that holds the `graph`, to use as a parent of other results."""
        return self.cache.identity(self._stage_and_graph(plan, mode)[0])

    def _stage_and_graph(self, plan: RankPlan, mode: str) -> tuple[str, Path]:
        """Return the name of the stage that holds the graph, and the path of the graph."""
        slug = slug_of(plan)
        if mode != FLOAT32:
            stage, parents = f"fit-graph-{slug}-{mode}", [self._calibration, self.graph_identity(plan, FLOAT32)]
            folder = self.cache.get_or_compute(stage, {"mode": mode}, parents, partial(self._quantize, plan, mode))
            return stage, folder / FILE_NAMES[mode]
        if slug == "dense":
            return "baseline", self.session.workspace.folder("baseline") / "onnx" / "model.onnx"
        return f"fit-model-{slug}", self._model_result(plan) / "model" / "onnx" / "model.onnx"

    def _quantize(self, plan: RankPlan, mode: str, folder: Path) -> None:
        source = self.graph(plan, FLOAT32)
        graph = folder / FILE_NAMES[mode]
        quantize_graph(source, graph, mode, partial(activation_sample, self.session.on_cpu, source))
        tell_quantized(f"{slug_of(plan)} {mode}", count_quantized(source, graph))

    def metrics(self, plan: RankPlan, mode: str, split: str = "evaluation") -> Metrics:
        """Return the metrics of the graph on ONNX Runtime.

        Args:
            split: ``evaluation`` or ``held-out``.
        """
        name = f"fit-{split}-{slug_of(plan)}-{mode}"
        options = {"split": split}
        if split == "evaluation":
            options["evaluation"] = self.session.data.evaluation_fingerprint
        folder = self.cache.get_or_compute(
            name, options, [self.graph_identity(plan, mode)], partial(self._evaluate, plan, mode, split)
        )
        return Metrics(**json.loads((folder / "metrics.json").read_text(encoding="utf-8")))

    def _evaluate(self, plan: RankPlan, mode: str, split: str, folder: Path) -> None:
        session = self.session.on_cpu
        samples = session.data.evaluation if split == "evaluation" else session.held_out
        description = f"{slug_of(plan)} {mode}, {split}"
        write_json(folder / "metrics.json", asdict(session.graph_metrics(self.graph(plan, mode), description, samples)))

    def drop(self, plan: RankPlan, mode: str) -> float:
        """Return the drop of the metric against the dense float32 graph, on the evaluation split (see `drop_of`)."""
        dense, graph = self.metrics(self.dense, FLOAT32), self.metrics(plan, mode)
        return drop_of(dense.metric, dense.value, graph.value)

    def write_folder(self, plan: RankPlan, mode: str, folder: Path) -> None:
        """Write the deployable folder of a plan. Its ``onnx/`` holds the measured graph."""
        session = self.session.on_cpu
        if slug_of(plan) == "dense":
            model, dtype = session.load_dense(), DTYPES[session.artifact_dtype]
            if holds_exactly(
                model, dtype
            ):  # otherwise (after a merge, for example) the weights would differ from the graph
                cast_weights(model, dtype)
            save_folder(model, folder, session.fresh_processor())
            shutil.copytree(self.graph(plan, FLOAT32).parent, folder / "onnx", copy_function=link)
        else:
            shutil.copytree(self._model_result(plan) / "model", folder, copy_function=link)
        if mode != FLOAT32:
            graph_folder = self.graph(plan, mode).parent
            shutil.copytree(graph_folder, folder / "onnx", copy_function=link, dirs_exist_ok=True)


def slug_of(plan: RankPlan) -> str:
    """Return a short name of the plan: ``dense``, or a hash of its ranks."""
    facts = plan_facts(plan)
    return sha256_of_text(json.dumps(facts))[:10] if facts["ranks"] else "dense"


def plan_facts(plan: RankPlan) -> Row:
    """Return the plan as JSON types. The ranks include only the factored layers."""
    ranks = {name: rank for name, rank in sorted(plan.ranks.items()) if rank is not None}
    return {"ranks": ranks, "shared": sorted(list(group) for group in plan.shared)}
