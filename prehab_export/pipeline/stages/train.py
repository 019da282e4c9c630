"""The stages that train: prehab before truncation, refinement and rehab after it."""

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from converters.folder import save_folder
from prehab_export.compression import Statistics, factor_bases, find_strength, prehab, refine, rehab, save_statistics
from prehab_export.config import AUTO, USUAL_STRENGTH, PrehabConfig
from prehab_export.pipeline.latency_budget import cost_of
from prehab_export.pipeline.session import STATISTICS, Session
from prehab_export.pipeline.stages.calibrate import gather_statistics
from prehab_export.pipeline.stages.compress import compressed_loss, save_factored
from prehab_export.system import bar, say, write_json


def prehab_dense(session: Session, folder: Path) -> None:
    options = session.config.prehab
    statistics = session.load_statistics("calibrate")
    model = session.load_dense()
    without = compressed_loss(session, model, statistics) if options.guard else None
    trials: list[dict[str, float]] = []
    if options.strength == AUTO:
        options, trials = _with_found_strength(session, model, statistics)

    def dense_metric(candidate: nn.Module) -> dict[str, float]:
        metrics = session.metrics(candidate, session.held_out, "dense model on held-out samples")
        return {f"dense_{metrics.metric}": metrics.value, "dense_loss": metrics.loss}

    history, fresh = _prehabbed(session, model, statistics, options, "prehab", dense_metric)
    held_out = compressed_loss(session, model, fresh) if options.guard else None
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
    return history, gather_statistics(session, model, layers)


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
        return compressed_loss(session, candidate, fresh)

    strength, trials = find_strength(trial, USUAL_STRENGTH, options.trials)
    say(f"  λ = {strength:.3g} of " + ", ".join(f"{row['strength']:.3g}: {row['loss']:.4f}" for row in trials))
    return replace(options, strength=strength), trials


def refine_factors(session: Session, folder: Path) -> None:
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
    save_factored(session, model if kept else start, folder)


def rehab_factors(session: Session, folder: Path) -> None:
    options = session.config.rehab
    model = session.load_factored("refine" if session.config.refine.schedule.steps else "truncate")
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
    save_factored(session, model, folder)
