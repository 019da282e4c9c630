"""The training stages: prehab before truncation, refinement and rehab after it."""

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
    """Prehab the dense model; write it and its new moments if kept, and ``prehab.json``.

    With the guard, the model is kept only if that lowers the held-out loss after truncation.
    """
    options = session.config.prehab
    model = session.load_dense()
    calibrated = session.calibrated(model, session.load_statistics("calibrate"))
    loss_without = compressed_loss(session, calibrated) if options.guard else None
    trials: list[dict[str, float]] = []
    if options.strength == AUTO:
        options, trials = _find_strength(session, calibrated)

    def dense_metric(candidate: nn.Module) -> dict[str, float]:
        metrics = session.metrics(candidate, session.held_out, "dense model on held-out samples")
        return {f"dense_{metrics.metric}": metrics.value, "dense_loss": metrics.loss}

    history, prepared = _run_prehab(session, calibrated, options, "prehab", dense_metric)
    loss_with = compressed_loss(session, prepared) if options.guard else None
    is_kept = loss_with is None or loss_without is None or loss_with < loss_without
    if is_kept:
        save_statistics(prepared.statistics, folder / STATISTICS)
    if not session.workspace.writable:
        return
    if is_kept:
        save_folder(model.cpu(), folder / "model", session.fresh_processor())
    losses = {"truncated_loss_without": loss_without, "truncated_loss_with": loss_with}
    facts = {"kept": is_kept, "strength": options.strength, "strength_trials": trials, **losses, "history": history}
    write_json(folder / "prehab.json", facts)


def _run_prehab(
    session: Session,
    calibrated: Calibrated,
    options: PrehabConfig,
    description: str,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> tuple[list[dict[str, float]], Calibrated]:
    """Prehab the model in place.

    Args:
        description: the title of the progress bar.
        evaluate: returns metrics of the model, for the history.

    Returns:
        The training history, and the model with its new moments.
    """
    config = session.config
    progress = named(bar, description)
    history = prehab(
        calibrated, session.training, options, config.cut, evaluate=evaluate, seed=config.seed, progress=progress
    )
    model = cast(PreTrainedModel, calibrated.model)
    return history, calibrated.with_statistics(gather_statistics(session, model, session.calibrated_samples))


def _find_strength(session: Session, calibrated: Calibrated) -> tuple[PrehabConfig, list[dict[str, float]]]:
    """Replace the strength ``auto`` by the best λ of several trials, each with a quarter of the training steps.

    Returns:
        The options with that λ, and the strength and loss of every trial.
    """
    options = session.config.prehab
    trial_schedule = replace(options.train, steps=max(1, options.train.steps // 4))

    def trial(strength: float) -> float:
        candidate = replace(calibrated, model=copy.deepcopy(calibrated.model))
        trial_options = replace(options, strength=strength, train=trial_schedule)
        description = f"try λ = {strength:.3g}"
        return compressed_loss(session, _run_prehab(session, candidate, trial_options, description)[1])

    strength, trials = find_strength(trial, USUAL_STRENGTH, options.trials)
    losses = ", ".join(f"{row['strength']:.3g}: {row['loss']:.4f}" for row in trials)
    say(f"  λ = {strength:.3g} (losses of the trials: {losses})")
    return replace(options, strength=strength), trials


def refine_factors(session: Session, folder: Path) -> None:
    """Refine the truncated model's factors; write the model with the lower held-out loss, and ``refine.json``."""
    options = session.config.refine
    model = session.load_factored("truncate")
    teacher_name, teacher = session.load_teacher()
    loss_before = session.held_out_loss(model)
    truncated = copy.deepcopy(model)
    factored = Factored.of(model, session.task, session.load_prepared_statistics())
    history = refine(factored, session.training, options, teacher=teacher, seed=session.config.seed, progress=bar)
    loss_after = session.held_out_loss(model)
    is_kept = loss_after < loss_before
    facts = {
        "kept": is_kept,
        "held_out_loss_before": loss_before,
        "held_out_loss_after": loss_after,
        "teacher": teacher_name,
    }
    if not session.workspace.writable:
        return
    write_json(folder / "refine.json", facts | {"samples": len(session.training), "history": history})
    save_factored(session, model if is_kept else truncated, folder)


def rehab_factors(session: Session, folder: Path) -> None:
    """Rehab the factored model; write it and ``rehab.json``."""
    options = session.config.rehab
    model = session.load_factored("refine" if session.config.refine.schedule.steps else "truncate")
    teacher_name, teacher = session.load_teacher() if options.train.distill else (None, None)
    factored = Factored(model, session.task)
    if options.method != "lora":  # LoRA does not use the factors' eigenbases
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
    if not session.workspace.writable:
        return
    write_json(folder / "rehab.json", asdict(result) | {"teacher": teacher_name})
    save_factored(session, model, folder)
