"""The stages of a run: folder in, folder out. Each reads what earlier ones published and writes its own.

The work itself is done by ordinary functions on ordinary objects (``calibrate``, ``prehab``, ``truncate`` …); what
stands here only fetches their input and puts their output away.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from converters.adapters import merge_dense_adapter
from converters.coverage import coverage
from converters.folder import save_folder
from converters.lowrank import DenseLinear, dense_weight
from converters.model_config import ties_embeddings, vocabulary_size
from prehab_export.benchmark import bench
from prehab_export.calibration import CalibrationWarning, calibrate, doubts
from prehab_export.compression import Compression, Samplesets, compress
from prehab_export.config import AUTO, USUAL_STRENGTH, PrehabConfig, RunConfig
from prehab_export.devices import device_of, room_for
from prehab_export.eigenbasis import factor_bases
from prehab_export.export import DIGESTS, export_artifact, export_baseline
from prehab_export.latency_budget import cost_of, predicted_latency, time_ranks
from prehab_export.ort_files import write_ort_files
from prehab_export.parity import digests_of
from prehab_export.preflight import check_runs
from prehab_export.prehabilitation import prehab
from prehab_export.progress import bar, say, warn
from prehab_export.quantization import graph_hashes, graphs_of, quantize
from prehab_export.refinement import refine
from prehab_export.rehabilitation import rehab
from prehab_export.report import public_names, write_report
from prehab_export.session import STATISTICS, Session, bench_config
from prehab_export.statistics import Statistics, moments_size, save_statistics
from prehab_export.strength_search import find_strength
from prehab_export.targets.results import results_of
from prehab_export.training import frozen_copy
from prehab_export.truncation import Truncation
from prehab_export.verification import publish_artifact, verify_in_fresh_process
from prehab_export.workspace import write_json


@dataclass(frozen=True)
class Stage:
    """What a stage does, which options its output depends on, which stages it reads, when it is wanted, and what it
    reads besides. All that it reads is named here: from it the stage's key is made, and with a wrong one a changed
    option would leave an old result standing."""

    name: str
    work: Callable[[Session, Path], None]
    options: Callable[[RunConfig], Mapping[str, Any]]
    parents: tuple[str, ...] = ()
    wanted: Callable[[RunConfig], bool] = lambda _config: True
    outside: Callable[[Session], Mapping[str, Any]] = lambda _session: {}


def _merge(session: Session, folder: Path) -> None:
    model = session.load_given()
    tied = ties_embeddings(model.config)
    merge_dense_adapter(model, Path(str(session.config.adapter)))
    if tied and not ties_embeddings(model.config):
        say("  the adapter tells embedding and head apart: they are no longer tied, and both are stored")
    save_folder(model, folder / "model", session.fresh_processor())


def _calibrate(session: Session, folder: Path) -> None:
    model = session.load_dense()
    check_runs(model, session.calibration, session.task)
    layers = session.layers(model)
    statistics = _statistics(session, model, layers)
    save_statistics(statistics, folder / STATISTICS)
    warned = doubts(statistics)
    for warning in warned:
        warn(warning)
    facts = {
        "samples": len(session.calibration),
        "tokens": {group: moment.tokens for group, moment in statistics.inputs.items()},
        "layers": len(layers),
        "input_groups": len(statistics.inputs),
        "groups": statistics.groups,
        "gradient_units": statistics.units,
        "warnings": warned,
    }
    write_json(folder / "calibrate.json", facts)


def _statistics(session: Session, model: PreTrainedModel, layers: Mapping[str, DenseLinear]) -> Statistics:
    options = session.config
    shapes = ((w.shape[0], w.shape[1]) for w in map(dense_weight, layers.values()))
    with bar("calibrate", len(session.calibration)) as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # said once, by the stage
        return calibrate(
            model,
            session.calibration.batches(options.data.batch_size),
            session.task,
            layers,
            gradients=options.needs_gradients,
            labels=options.calibrate.labels,
            keep_on=room_for(moments_size(shapes, options.needs_gradients), device_of(model)),
            seed=options.seed,
            progress=advance,
        )


def _prehab(session: Session, folder: Path) -> None:
    options = session.config.prehab
    statistics = session.load_statistics("calibrate")
    model = session.load_dense()
    without = _compressed_loss(session, model, statistics) if options.guard else None
    trials: list[dict[str, float]] = []
    if options.strength == AUTO:
        options, trials = _with_found_strength(session, model, statistics)

    def dense_metric(candidate: nn.Module) -> dict[str, float]:
        metrics = session.metrics(candidate, session.held_out, "dense model on held-out samples")
        return {f"dense_{metrics.metric}": metrics.value, "dense_loss": metrics.loss}

    history, fresh = _prehabbed(session, model, statistics, options, "prehab", dense_metric)
    held_out = _compressed_loss(session, model, fresh) if options.guard else None
    kept = held_out is None or without is None or held_out < without
    if kept:
        save_folder(model.cpu(), folder / "model", session.fresh_processor())
        save_statistics(fresh, folder / STATISTICS)
    losses = {"truncated_loss_without": without, "truncated_loss_with": held_out}
    facts = {"kept": kept, "strength": options.strength, "strength_trials": trials, **losses, "history": history}
    write_json(folder / "prehab.json", facts)


def _prehabbed(
    session: Session,
    model: PreTrainedModel,
    statistics: Statistics,
    options: PrehabConfig,
    what: str,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> tuple[list[dict[str, float]], Statistics]:
    """Prehab the model in place; its history, and the moments of what it has become."""
    layers = session.layers(model)
    with bar(what, options.train.steps) as advance:
        history = prehab(
            model,
            session.task,
            session.training,
            layers,
            statistics,
            options,
            session.config.cut,
            fisher_labels=session.config.calibrate.labels,
            cost=cost_of(session),
            seed=session.config.seed,
            evaluate=evaluate,
            progress=lambda row: advance(1, note=f"loss {row['task_loss']:.3f}, surrogate {row['surrogate']:.3f}"),
        )
    return history, _statistics(session, model, layers)


def _with_found_strength(
    session: Session, model: PreTrainedModel, statistics: Statistics
) -> tuple[PrehabConfig, list[dict[str, float]]]:
    """The options with a λ in the place of ``auto``, found by trials of a quarter of the steps each."""
    options = session.config.prehab
    short = replace(options.train, steps=max(1, options.train.steps // 4))

    def trial(strength: float) -> float:
        candidate = copy.deepcopy(model)
        _, fresh = _prehabbed(
            session, candidate, statistics, replace(options, strength=strength, train=short), f"try λ = {strength:.3g}"
        )
        return _compressed_loss(session, candidate, fresh)

    strength, trials = find_strength(trial, USUAL_STRENGTH, options.trials)
    say(f"  λ = {strength:.3g} of " + ", ".join(f"{row['strength']:.3g}: {row['loss']:.4f}" for row in trials))
    return replace(options, strength=strength), trials


def _compressed_loss(session: Session, model: PreTrainedModel, statistics: Statistics) -> float:
    """Held-out loss of the model as it would be compressed now; the model itself is left alone."""
    return session.held_out_loss(_compressed(session, model, statistics).truncation.apply(frozen_copy(model)))


def _compressed(session: Session, model: nn.Module, statistics: Statistics) -> Compression:
    samples = Samplesets(session.calibration, session.held_out, session.config.data.batch_size)
    return compress(
        model,
        session.task,
        session.layers(model),
        statistics,
        samples,
        session.config.cut,
        session.config.refine,
        cost=cost_of(session),
        seed=session.config.seed,
        progress=bar,
    )


def _truncate(session: Session, folder: Path) -> None:
    model, statistics = session.load_prepared()
    covered = coverage(model, session.layers(model))
    compression = _compressed(session, model, statistics)
    for warning in compression.warnings:
        warn(warning)
    latency = predicted_latency(session, compression.truncation)
    _say_what_was_removed(session, compression.truncation, latency)
    compression.truncation.apply(model)
    facts = compression.summary() | {
        "total_parameters_before": covered.total,
        "total_parameters_after": sum(parameter.numel() for parameter in model.parameters()),
        "coverage": covered.facts(),
        "predicted_latency": latency,
    }
    if covered.warning is not None:  # said at the start
        facts["warnings"] = [covered.warning, *facts["warnings"]]
    write_json(folder / "truncate.json", facts)
    _save_factored(session, model, folder)


def _save_factored(session: Session, model: PreTrainedModel, folder: Path) -> None:
    model.cpu()
    write_json(folder / DIGESTS, digests_of(model))
    save_folder(model, folder / "model", session.fresh_processor())


def _refine(session: Session, folder: Path) -> None:
    options = session.config.refine
    model = session.load_factored("truncate")
    followed, teacher = session.load_teacher()
    before = session.held_out_loss(model)
    start = copy.deepcopy(model)
    with bar("refine", options.schedule.steps) as advance:
        history = refine(
            model,
            teacher,
            session.task,
            session.training,
            options,
            bases=factor_bases(model, session.load_prepared_statistics()),
            seed=session.config.seed,
            progress=lambda row: advance(1, note=f"divergence {row['divergence']:.4f}"),
        )
    after = session.held_out_loss(model)
    kept = after < before
    facts = {"kept": kept, "held_out_loss_before": before, "held_out_loss_after": after, "teacher": followed}
    write_json(folder / "refine.json", facts | {"samples": len(session.training), "history": history})
    _save_factored(session, model if kept else start, folder)


def _say_what_was_removed(session: Session, truncation: Truncation, latency: float | None) -> None:
    options, removed = session.config.cut, truncation.summary()["targeted_share_removed"]
    asked, found = options.ratio, removed
    if options.latency is not None and latency is not None:
        asked, found = options.latency, latency
        say(f"  {removed:.0%} of the parameters removed; the layers should take {latency:.0%} of their dense time")
    if abs(found - asked) > 0.03:
        warn(f"{found:.0%} where {asked:.0%} was asked: ranks are whole and have a floor")


def _rehab(session: Session, folder: Path) -> None:
    options = session.config.rehab
    model = session.load_factored("refine" if _needs_refinement(session.config) else "truncate")
    followed, teacher = session.load_teacher() if options.train.distill else (None, None)
    tunes = options.method != "lora"  # adapters have no use for the factors' bases
    bases = factor_bases(model, session.load_prepared_statistics()) if tunes else None
    with bar("rehab", options.train.steps) as advance:
        result = rehab(
            model,
            session.task,
            session.training,
            options,
            held_out_loss=session.held_out_loss,
            seed=session.config.seed,
            teacher=teacher,
            bases=bases,
            progress=lambda row: advance(1, note=f"loss {row['task_loss']:.3f}"),
        )
    write_json(folder / "rehab.json", asdict(result) | {"teacher": followed})
    _save_factored(session, model, folder)


def _bench(session: Session, folder: Path) -> None:
    vocabulary = vocabulary_size(session.model_config)
    write_json(folder / "bench.json", bench(graphs_of(session), bench_config(session), vocabulary))


def _targets(session: Session) -> dict[str, Any]:
    """What was measured elsewhere of these very graphs."""
    return results_of(session.workspace.root, graph_hashes(session))


def _needs_prehab(config: RunConfig) -> bool:
    return config.prehab.train.steps > 0


def _needs_refinement(config: RunConfig) -> bool:
    return config.refine.schedule.steps > 0


def _needs_rehab(config: RunConfig) -> bool:
    return config.rehab.train.steps > 0


def _calibration_options(config: RunConfig) -> dict[str, Any]:
    # Of the precision depends all that follows; the device changes no more than the rounding.
    return asdict(config.calibrate) | {"gradients": config.needs_gradients, "precision": config.precision}


def _truncation_options(config: RunConfig) -> dict[str, Any]:
    """Truncation as it is carried out: block-wise refinement is part of it, where there is any."""
    blocks = config.refine.block_schedule
    return asdict(config.cut) | {"block_refinement": asdict(blocks) if blocks.steps else None}


def _refinement_options(config: RunConfig) -> dict[str, Any]:
    return {"schedule": asdict(config.refine.schedule), "hidden_share": config.refine.hidden_share}


def _times_options(config: RunConfig) -> dict[str, Any]:
    # Everything measured depends on the machine too, but a run that goes on elsewhere keeps what it was planned by.
    return {
        "threads": config.bench.threads,
        "batch": config.bench.batch_sizes[0],
        "length": config.bench.sequence_lengths[0],
        "objective": config.cut.objective,
    }


def _judging(session: Session) -> dict[str, Any]:
    """What the task's metric is taken over. The few samples that a graph is checked on may be any."""
    return {"evaluation": session.data.evaluation_fingerprint}


def _card_options(config: RunConfig) -> dict[str, Any]:
    """What the model card quotes that is in no other stage's key: names, which a moved folder changes."""
    public = public_names(config)
    return {"model": public.model, "data": public.data.data}


# Stages whose figures the model card and the report quote.
_QUOTED = ("calibrate", "prehab", "truncate", "refine", "rehab", "export", "baseline", "verify", "quantize", "ort")

STAGES = {
    stage.name: stage
    for stage in (
        Stage("merge", _merge, lambda c: {}, wanted=lambda c: c.adapter is not None),
        Stage("calibrate", _calibrate, _calibration_options, ("merge",)),
        Stage("times", time_ranks, _times_options, ("calibrate",), lambda c: c.truncate.latency is not None),
        Stage(
            "prehab",
            _prehab,
            lambda c: {"prehab": asdict(c.prehab), "truncate": _truncation_options(c)},
            ("merge", "calibrate", "times"),
            _needs_prehab,
        ),
        Stage("truncate", _truncate, _truncation_options, ("merge", "calibrate", "times", "prehab")),
        Stage(
            "refine",
            _refine,
            _refinement_options,
            ("merge", "calibrate", "prehab", "truncate"),
            _needs_refinement,
        ),
        Stage(
            "rehab",
            _rehab,
            lambda c: asdict(c.rehab),
            ("merge", "calibrate", "prehab", "truncate", "refine"),
            _needs_rehab,
        ),
        Stage(
            "export",
            lambda session, folder: export_artifact(session.on_cpu, folder),
            lambda c: {"kv_cache": c.kv_cache, "dtype": c.dtype},
            ("truncate", "refine", "rehab"),
        ),
        Stage(
            "baseline",
            lambda session, folder: export_baseline(session.on_cpu, folder),
            lambda c: {},
            ("merge",),
            outside=_judging,
        ),
        Stage(
            "verify",
            lambda session, folder: verify_in_fresh_process(session.on_cpu, folder),
            lambda c: {},
            ("export", "baseline"),
            outside=_judging,
        ),
        Stage(
            "quantize",
            lambda session, folder: quantize(session.on_cpu, folder),
            lambda c: {
                "modes": c.quantize,
                "refit": c.quantize_refit,
                "shrinkage": c.cut.gradient_shrinkage,
            },
            ("merge", "calibrate", "prehab", "export", "baseline", "verify"),
            lambda c: bool(c.quantize),
            _judging,
        ),
        Stage(
            "ort",
            lambda session, folder: write_ort_files(session.on_cpu, folder),
            lambda c: {"modes": c.quantize},
            ("export", "verify", "quantize"),
            lambda c: c.ort,
        ),
        Stage("artifact", publish_artifact, _card_options, _QUOTED),
        Stage("bench", _bench, lambda c: asdict(c.bench), ("artifact", "baseline", "quantize")),
        Stage(
            "report",
            lambda session, folder: write_report(session, folder, _targets(session)),
            asdict,
            (*_QUOTED, "artifact", "bench"),
            outside=lambda session: {"targets": _targets(session)},
        ),
    )
}
