"""The stages that train: prehab before truncation, refinement and rehab after it."""

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from converters.folder import save_folder
from prehab_export.compression import Calibrated, Factored, find_strength, prehab, refine, rehab, save_statistics
from prehab_export.config import AUTO, USUAL_STRENGTH, PrehabConfig
from prehab_export.pipeline.session import STATISTICS, Session
from prehab_export.pipeline.stages.calibrate import gather_statistics
from prehab_export.pipeline.stages.compress import compressed_loss, save_factored
from prehab_export.system import bar, named, say, write_json


def prehab_dense(session: Session, folder: Path) -> None:
    options = session.config.prehab
    model = session.load_dense()
    calibrated = session.calibrated(model, session.load_statistics("calibrate"))
    without = compressed_loss(session, calibrated) if options.guard else None
    trials: list[dict[str, float]] = []
    if options.strength == AUTO:
        options, trials = _with_found_strength(session, calibrated)

    def dense_metric(candidate: nn.Module) -> dict[str, float]:
        metrics = session.metrics(candidate, session.held_out, "dense model on held-out samples")
        return {f"dense_{metrics.metric}": metrics.value, "dense_loss": metrics.loss}

    history, prepared = _prehabbed(session, calibrated, options, "prehab", dense_metric)
    held_out = compressed_loss(session, prepared) if options.guard else None
    kept = held_out is None or without is None or held_out < without
    if kept:
        save_folder(model.cpu(), folder / "model", session.fresh_processor())
        save_statistics(prepared.statistics, folder / STATISTICS)
    losses = {"truncated_loss_without": without, "truncated_loss_with": held_out}
    facts = {"kept": kept, "strength": options.strength, "strength_trials": trials, **losses, "history": history}
    write_json(folder / "prehab.json", facts)


def _prehabbed(
    session: Session,
    calibrated: Calibrated,
    options: PrehabConfig,
    what: str,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> tuple[list[dict[str, float]], Calibrated]:
    """Prehab the model in place; its history, and the model with the moments of what it has become."""
    config = session.config
    progress = named(bar, what)
    history = prehab(
        calibrated, session.training, options, config.cut, evaluate=evaluate, seed=config.seed, progress=progress
    )
    return history, calibrated.with_statistics(gather_statistics(session, cast(PreTrainedModel, calibrated.model)))


def _with_found_strength(session: Session, calibrated: Calibrated) -> tuple[PrehabConfig, list[dict[str, float]]]:
    """The options with a λ in the place of ``auto``, found by trials of a quarter of the steps each."""
    options = session.config.prehab
    short = replace(options.train, steps=max(1, options.train.steps // 4))

    def trial(strength: float) -> float:
        candidate = replace(calibrated, model=copy.deepcopy(calibrated.model))
        tried = replace(options, strength=strength, train=short)
        return compressed_loss(session, _prehabbed(session, candidate, tried, f"try λ = {strength:.3g}")[1])

    strength, trials = find_strength(trial, USUAL_STRENGTH, options.trials)
    say(f"  λ = {strength:.3g} of " + ", ".join(f"{row['strength']:.3g}: {row['loss']:.4f}" for row in trials))
    return replace(options, strength=strength), trials


def refine_factors(session: Session, folder: Path) -> None:
    options = session.config.refine
    model = session.load_factored("truncate")
    followed, teacher = session.load_teacher()
    before = session.held_out_loss(model)
    start = copy.deepcopy(model)
    factored = Factored.of(model, session.task, session.load_prepared_statistics())
    history = refine(factored, session.training, options, teacher=teacher, seed=session.config.seed, progress=bar)
    after = session.held_out_loss(model)
    kept = after < before
    facts = {"kept": kept, "held_out_loss_before": before, "held_out_loss_after": after, "teacher": followed}
    write_json(folder / "refine.json", facts | {"samples": len(session.training), "history": history})
    save_factored(session, model if kept else start, folder)


def rehab_factors(session: Session, folder: Path) -> None:
    options = session.config.rehab
    model = session.load_factored("refine" if session.config.refine.schedule.steps else "truncate")
    followed, teacher = session.load_teacher() if options.train.distill else (None, None)
    factored = Factored(model, session.task)
    if options.method != "lora":  # adapters have no use for the factors' bases
        factored = Factored.of(model, session.task, session.load_prepared_statistics())
    result = rehab(
        factored,
        session.training,
        options,
        held_out_loss=session.held_out_loss,
        teacher=teacher,
        seed=session.config.seed,
        progress=bar,
    )
    write_json(folder / "rehab.json", asdict(result) | {"teacher": followed})
    save_factored(session, model, folder)
