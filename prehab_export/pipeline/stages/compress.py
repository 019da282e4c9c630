"""The stage that truncates, and what the stages around it need of it."""

from pathlib import Path

from transformers import PreTrainedModel

from converters.coverage import coverage
from converters.folder import save_folder
from prehab_export.compression import (
    Calibrated,
    Compression,
    Samplesets,
    Truncation,
    block_refiner,
    compress,
    frozen_copy,
)
from prehab_export.deployment import tensor_digests
from prehab_export.pipeline.latency_budget import predicted_latency
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.stages.export import DIGESTS
from prehab_export.system import bar, say, warn, write_json


def compressed_loss(session: Session, calibrated: Calibrated) -> float:
    """Held-out loss of the model as it would be compressed now; the model itself is left alone."""
    truncation = _compressed(session, calibrated).truncation
    return session.held_out_loss(truncation.apply(frozen_copy(calibrated.model)))


def _compressed(session: Session, calibrated: Calibrated) -> Compression:
    config = session.config
    samples = Samplesets(session.calibration, session.held_out, config.data.batch_size)
    tunes = config.refine.block_steps > 0
    return compress(
        calibrated,
        samples,
        config.cut,
        after_block=block_refiner(config.refine, calibrated.statistics, seed=config.seed) if tunes else None,
        progress=bar,
    )


def truncate_prepared(session: Session, folder: Path) -> None:
    model, statistics = session.load_prepared()
    calibrated = session.calibrated(model, statistics)
    covered = coverage(model, calibrated.layers)
    compression = _compressed(session, calibrated)
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
    save_factored(session, model, folder)


def save_factored(session: Session, model: PreTrainedModel, folder: Path) -> None:
    model.cpu()
    write_json(folder / DIGESTS, tensor_digests(model))
    save_folder(model, folder / "model", session.fresh_processor())


def _say_what_was_removed(session: Session, truncation: Truncation, latency: float | None) -> None:
    options, removed = session.config.cut, truncation.summary()["selected_share_removed"]
    asked, found = options.ratio, removed
    if options.latency is not None and latency is not None:
        asked, found = options.latency, latency
        say(f"  {removed:.0%} of the parameters removed; the layers should take {latency:.0%} of their dense time")
    if abs(found - asked) > 0.03:
        warn(f"{found:.0%} where {asked:.0%} was asked: ranks are whole and have a floor")
