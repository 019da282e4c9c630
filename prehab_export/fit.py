"""The fit: the most accurate model within a budget on the device where it will run, or the proof that none was found.

The target is used twice: once for the probe (``probe``), from which everything is predicted (``fit_search``), and once
to measure the finalists. Whatever takes long is published by itself, so that a fit that was killed, or is asked again
with another budget, computes only what is missing.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from converters.errors import InputError
from converters.folder import save_folder
from converters.lowrank import dense_weight
from converters.onnx.modes import FILE_NAMES
from converters.onnx.quantize import quantize_graph
from prehab_export.bench_graph import read_graph
from prehab_export.budget import Budget, Figures, drop_of
from prehab_export.compression import Samplesets, compress
from prehab_export.config import PARAMETERS, RunConfig
from prehab_export.errors import BudgetError
from prehab_export.evaluation import Metrics
from prehab_export.export import export_model
from prehab_export.fit_report import write_fit
from prehab_export.fit_search import FLOAT32, Candidate, Layers, Line, Search, finalists, pareto
from prehab_export.fit_target import check_target, device_facts, measure_layers, measure_models
from prehab_export.latency_budget import layer_shapes, tokens_at_a_time
from prehab_export.models import empty_model
from prehab_export.parity import digests_of
from prehab_export.pipeline import bring_up, opened, stage_keys
from prehab_export.probe import Anchor, LayerProbe, layer_probes, understood
from prehab_export.progress import bar, say
from prehab_export.quantization import activation_sample
from prehab_export.session import Session, bench_config
from prehab_export.training import frozen_copy
from prehab_export.truncation import Decompositions, Plan, decompose_layers, ranks_by
from prehab_export.verification import graph_metrics, link, reloaded
from prehab_export.workspace import stage_key, write_json

# Shares of the targeted parameters that the anchors lack.
ANCHORS = (0.5, 0.85)
FINALISTS = 3

Row = dict[str, Any]


@dataclass(frozen=True)
class FitRequest:
    """target: where to measure (``fit_target``). threads: the numbers of threads that may be used there."""

    budget: Budget
    target: str = "local"
    threads: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if not self.threads or min(self.threads) < 1:
            raise InputError(f"--threads must be 1 or more, not {' '.join(map(str, self.threads)) or 'nothing'}")


def fit(config: RunConfig, output: Path, request: FitRequest) -> Path:
    """Find the most accurate model within the budget; returns the folder with table, plot and model.

    Args:
        config: the model, data and calibration; ``quantize`` are the kinds of quantisation that may be used.

    Raises:
        InputError: bad input or a target that cannot be reached, found before anything slow.
        BudgetError: nothing was found within the budget; the folder holds the figures.
    """
    cut = replace(config.truncate, budget=PARAMETERS, objective="fisher", allocation="loss")
    config = replace(config, truncate=cut)
    check_target(request.target, request.threads)
    with opened(config, output) as session:
        names = ["merge"] if config.adapter is not None else []
        bring_up(session, [*names, "calibrate", "baseline"])
        work = _Fit(session, request)
        result, chosen = work.run()
        key = stage_key("fit", result)
        with session.workspace.publish("fit", key, asdict(request)) as folder:
            write_fit(result, folder)
            if chosen is not None:
                work.write_model(chosen, folder / "model")
                shutil.copy2(folder / "fit.md", folder / "model" / "README.md")
    if chosen is None:
        raise BudgetError(f"{result['verdict']} Every figure is in {session.workspace.folder('fit')}")
    return session.workspace.folder("fit")


class _Fit:
    """One fit; each part is read where it is there and computed where it is not."""

    def __init__(self, session: Session, request: FitRequest) -> None:
        self.session, self.request = session, request
        self.modes = (FLOAT32, *dict.fromkeys(session.config.quantize))
        keys = stage_keys(session)
        self.parents = [keys["calibrate"], keys["baseline"]]
        self.dense = Plan(dict.fromkeys(self.layers.shapes))

    # What is computed once, and published by itself.

    def _stage(self, name: str, options: Mapping[str, Any], work: Callable[[Path], None]) -> Path:
        workspace, key = self.session.workspace, stage_key(name, options, self.parents)
        if not workspace.is_current(name, key):
            with workspace.publish(name, key, options) as folder:
                work(folder)
        return workspace.folder(name)

    @cached_property
    def model(self) -> PreTrainedModel:
        return self.session.load_dense()

    @cached_property
    def decomposed(self) -> Decompositions:
        session, layers = self.session, self.session.layers(self.model)
        with bar("decompose", len(layers)) as advance:
            return decompose_layers(
                layers, session.load_statistics("calibrate"), session.config.truncate, progress=advance
            )

    @cached_property
    def layers(self) -> Layers:
        """Shapes and predicted losses; of the weights nothing is needed once these are known."""
        session, cut = self.session, self.session.config.truncate
        options = {"shrinkage": cut.gradient_shrinkage, "share_inputs": cut.share_inputs}
        folder = self._stage("fit-spectra", options, self._write_spectra)
        tensors, index = load_file(folder / "losses.safetensors"), json.loads((folder / "index.json").read_text())
        empty = empty_model(session.model_config, session.task, trust_remote_code=session.config.trust_remote_code)
        shapes = {name: dense_weight(layer).shape for name, layer in session.layers(empty).items()}
        losses = {tuple(names): tensors[str(at)] for at, names in enumerate(index)}
        return Layers(
            shapes={name: (shape[0], shape[1]) for name, shape in shapes.items()},
            losses={names[0]: values for names, values in losses.items() if len(names) == 1},
            joint={names: values for names, values in losses.items() if len(names) > 1},
            multiple=cut.rank_multiple,
            floor_share=cut.floor_share,
        )

    def _write_spectra(self, folder: Path) -> None:
        single, joint = self.decomposed.losses
        entries = [((name,), values) for name, values in single.items()] + list(joint.items())
        save_file({str(at): x.cpu().contiguous() for at, (_, x) in enumerate(entries)}, folder / "losses.safetensors")
        write_json(folder / "index.json", [list(names) for names, _ in entries])

    def _made(self, plan: Plan) -> Path:
        """``model/`` with its graph, exported and reopened, of a plan that cuts something."""
        return self._stage(f"fit-model-{slug_of(plan)}", _plan_facts(plan), partial(self._make, plan))

    def _make(self, plan: Plan, folder: Path) -> None:
        session, config = self.session, self.session.config
        say(f"[bold]make a model of {len(_plan_facts(plan)['ranks'])} cut layers")
        result = compress(
            self.model,
            session.task,
            session.layers(self.model),
            session.load_statistics("calibrate"),
            Samplesets(session.calibration, session.held_out, config.data.batch_size),
            config.truncate,
            decomposed=self.decomposed,
            plan=plan,
            seed=config.seed,
            progress=bar,
        )
        model = cast(PreTrainedModel, frozen_copy(self.model))
        result.truncation.apply(model)
        model.cpu()
        export_model(session.on_cpu, model, folder, digests_of(model))
        reloaded(session.on_cpu, folder)

    def graph(self, plan: Plan, mode: str) -> Path:
        """The ONNX graph of a plan in a mode."""
        if mode != FLOAT32:
            options = _plan_facts(plan) | {"mode": mode}
            return (
                self._stage(f"fit-graph-{slug_of(plan)}-{mode}", options, partial(self._quantize, plan, mode))
                / (FILE_NAMES[mode])
            )
        if slug_of(plan) == "dense":
            return self.session.workspace.folder("baseline") / "onnx" / "model.onnx"
        return self._made(plan) / "model" / "onnx" / "model.onnx"

    def _quantize(self, plan: Plan, mode: str, folder: Path) -> None:
        source = self.graph(plan, FLOAT32)
        quantize_graph(source, folder / FILE_NAMES[mode], mode, partial(activation_sample, self.session.on_cpu, source))

    def metrics(self, plan: Plan, mode: str, split: str = "evaluation") -> Metrics:
        """Of the graph, on ONNX Runtime."""
        name = f"fit-{split}-{slug_of(plan)}-{mode}"
        options = _plan_facts(plan) | {"mode": mode, "split": split}
        folder = self._stage(name, options, partial(self._evaluate, plan, mode, split))
        return Metrics(**json.loads((folder / "metrics.json").read_text()))

    def _evaluate(self, plan: Plan, mode: str, split: str, folder: Path) -> None:
        session = self.session.on_cpu
        samples = session.data.evaluation if split == "evaluation" else session.held_out
        description = f"{slug_of(plan)} {mode}, {split}"
        write_json(
            folder / "metrics.json", asdict(graph_metrics(session, self.graph(plan, mode), description, samples))
        )

    # What the target tells.

    def _anchors(self) -> list[tuple[Plan, str]]:
        """The dense model and a few cut ones, in every mode."""
        session, layers = self.session, self.layers
        empty = empty_model(session.model_config, session.task, trust_remote_code=session.config.trust_remote_code)
        linears, losses = session.layers(empty), (dict(layers.losses), dict(layers.joint))
        cuts = [ranks_by(linears, losses, replace(session.config.truncate, ratio=removed)) for removed in ANCHORS]
        return [(plan, mode) for plan in (self.dense, *cuts) for mode in self.modes]

    def _search(self) -> tuple[Search, Line, list[Row]]:
        """What is known of the target, and the line from predicted loss to the metric's drop."""
        plans, tokens = self._anchors(), tokens_at_a_time(self.session)
        anchors = [self._anchor(plan, mode) for plan, mode in plans]
        options = {
            "target": self.request.target,
            "threads": list(self.request.threads),
            "tokens": tokens,
            "anchors": [anchor.slug for anchor in anchors],
            "bench": asdict(bench_config(self.session)),
        }
        folder = self._stage("fit-probe", options, partial(self._probe, anchors, tokens))
        told = json.loads((folder / "probe.json").read_text())
        probes = [LayerProbe(**row | {"shape": tuple(row["shape"]), "graph": Path()}) for row in told["layers"]]
        reference = self.metrics(self.dense, FLOAT32, "held-out").loss
        penalties = {mode: self.metrics(self.dense, mode, "held-out").loss - reference for mode in self.modes}
        known = understood(told["rows"], self.layers, probes, anchors, penalties, tokens)
        if self.request.budget.memory_mb is not None and any(row.memory is None for row in known.values()):
            raise InputError(f"{self.request.target} does not tell how much memory a model takes; leave out --memory")
        float_plans = [plan for plan, mode in plans if mode == FLOAT32]
        drops = Line.through(
            (self.layers.loss(plan.ranks, plan.shared), self._drop(plan, FLOAT32)) for plan in float_plans
        )
        return Search(self.layers, known), drops, told["rows"]

    def _anchor(self, plan: Plan, mode: str) -> Anchor:
        graph = self.graph(plan, mode)
        units = self.layers.units(plan.ranks, plan.shared)
        return Anchor(f"{slug_of(plan)}-{mode}", mode, units, read_graph(graph).file_bytes / 1e6, graph)

    def _probe(self, anchors: Sequence[Anchor], tokens: int, folder: Path) -> None:
        say(f"[bold]probe {self.request.target}")
        shapes = layer_shapes(self.session)
        with bar("write layer graphs", len(set(shapes))) as advance:
            probes = list(layer_probes(shapes, tokens, self.modes, folder / "layers", advance))
        rows = measure_layers(probes, tokens, self.request.threads)
        shutil.rmtree(folder / "layers")
        rows += self._measure({anchor.slug: anchor.graph for anchor in anchors}, self.request.threads)
        asked = [{k: v for k, v in asdict(probe).items() if k != "graph"} for probe in probes]
        write_json(folder / "probe.json", {"layers": asked, "rows": rows})

    def _measure(self, models: Mapping[str, Path], threads: Sequence[int]) -> list[Row]:
        say(f"  time {len(models)} models")
        vocabulary = getattr(self.session.model_config.get_text_config(), "vocab_size", None)
        return measure_models(models, bench_config(self.session), threads, vocabulary)

    def _drop(self, plan: Plan, mode: str) -> float:
        dense, own = self.metrics(self.dense, FLOAT32), self.metrics(plan, mode)
        return drop_of(dense.metric, dense.value, own.value)

    # The result.

    def run(self) -> tuple[Row, Candidate | None]:
        """The result as JSON types, and the candidate that is recommended; None where none keeps to the budget."""
        budget = self.request.budget
        search, drops, probed = self._search()
        with bar("search", len(search.known)) as advance:
            candidates = search.all(budget, advance)
        chosen_few = finalists(candidates, budget, FINALISTS)
        final = self._finals(chosen_few)
        tried = {id(c): self._figures(c, final) for c in chosen_few}
        fitting = [c for c in chosen_few if not budget.misses(tried[id(c)])]
        uncut = [c for c in fitting if c.is_dense and c.setup.mode == FLOAT32]  # then nothing needs to be lost at all
        best = min(uncut or fitting, key=lambda c: (tried[id(c)].drop, tried[id(c)].p95_ms), default=None)
        beaten_by = pareto([(c.loss, c.predicted.p95_ms, c.predicted.size_mb) for c in candidates])
        rows = [
            candidate.facts()
            | {
                "predicted_drop": drops.at(candidate.loss),
                "pareto": unbeaten,
                "fits_by_prediction": not budget.misses(candidate.predicted),
                "measured": None if id(candidate) not in tried else asdict(tried[id(candidate)]),
                "recommended": candidate is best,
            }
            for candidate, unbeaten in zip(candidates, beaten_by, strict=True)
        ]
        dense = self.metrics(self.dense, FLOAT32)
        near = sorted(chosen_few, key=lambda c: budget.distance(tried[id(c)]))[0]
        result = {
            "model": Path(self.session.config.model).name,
            "task": self.session.config.task,
            "target": self.request.target.partition("//")[0],
            "device": device_facts(self.request.target),
            "budget": asdict(budget),
            "metric": asdict(dense),
            "verdict": _verdict(best, tried[id(best)], dense)
            if best is not None
            else _nearest(near, tried[id(near)], budget),
            "candidates": rows,
            "measured": {"probe": probed, "finalists": final},
        }
        return result, best

    def _finals(self, candidates: Sequence[Candidate]) -> list[Row]:
        """The finalists for real, beside the dense model."""
        models = {f"dense-{FLOAT32}": self.graph(self.dense, FLOAT32)}
        models |= {_slug(c): self.graph(_plan(c), c.setup.mode) for c in candidates}
        threads = sorted({c.setup.threads for c in candidates})
        options: Row = {"target": self.request.target, "threads": threads, "models": list(models)}
        options |= {"bench": asdict(bench_config(self.session))}

        def work(folder: Path) -> None:
            say(f"[bold]measure {len(candidates)} finalists on {self.request.target}")
            write_json(folder / "rows.json", self._measure(models, threads))

        return json.loads((self._stage("fit-finalists", options, work) / "rows.json").read_text())

    def _figures(self, candidate: Candidate, results: Sequence[Row]) -> Figures:
        wanted = (_slug(candidate), candidate.setup.threads)
        row = next(row for row in results if (row["model"], row["threads"]) == wanted)
        graph = self.graph(_plan(candidate), candidate.setup.mode)
        return Figures(
            p50_ms=row["p50_ms"],
            p95_ms=row["p95_ms"],
            memory_mb=row.get("peak_mb"),
            size_mb=read_graph(graph).file_bytes / 1e6,
            drop=self._drop(_plan(candidate), candidate.setup.mode),
        )

    def write_model(self, candidate: Candidate, folder: Path) -> None:
        """The deployable folder of a candidate: ``onnx/`` holds the graph that was measured."""
        plan, session = _plan(candidate), self.session.on_cpu
        if candidate.is_dense:
            save_folder(session.load_dense(), folder, session.fresh_processor())
            shutil.copytree(self.graph(plan, FLOAT32).parent, folder / "onnx", copy_function=link)
        else:
            shutil.copytree(self._made(plan) / "model", folder, copy_function=link)
        if candidate.setup.mode != FLOAT32:
            quantised = self.graph(plan, candidate.setup.mode).parent
            shutil.copytree(quantised, folder / "onnx", copy_function=link, dirs_exist_ok=True)


def slug_of(plan: Plan) -> str:
    """A plan's short name: ``dense``, or a hash of its ranks."""
    facts = _plan_facts(plan)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:10] if facts["ranks"] else "dense"


def _plan_facts(plan: Plan) -> Row:
    ranks = {name: rank for name, rank in sorted(plan.ranks.items()) if rank is not None}
    return {"ranks": ranks, "shared": sorted(list(group) for group in plan.shared)}


def _plan(candidate: Candidate) -> Plan:
    return Plan(candidate.ranks, candidate.shared)


def _slug(candidate: Candidate) -> str:
    return f"{slug_of(_plan(candidate))}-{candidate.setup.mode}"


def _verdict(best: Candidate, own: Figures, dense: Metrics) -> str:
    assert own.drop is not None
    start = "The dense model is within the budget: nothing needs to be cut. " if best.is_dense else ""
    unit = "points of accuracy" if dense.metric == "accuracy" else "% of perplexity"
    memory = "" if own.memory_mb is None else f", {own.memory_mb:.0f} MB of memory"
    off = best.predicted.p50_ms / own.p50_ms - 1
    return (
        f"{start}Take {best.name}: {100 * own.drop:.2f} {unit} lost, p95 {own.p95_ms:.2f} ms, file {own.size_mb:.1f} MB"
        f"{memory}. Its p50 was predicted as {best.predicted.p50_ms:.2f} ms, {off:+.1%} off."
    )


def _nearest(near: Candidate, own: Figures, budget: Budget) -> str:
    over = "; ".join(f"{m.limit} {m.found:.4g} where {m.allowed:.4g} is allowed" for m in budget.misses(own))
    return f"No model was found within the budget. The nearest is {near.name}: {over}."
