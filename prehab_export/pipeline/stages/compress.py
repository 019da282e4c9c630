"""The truncation stage, and functions that the training stages share with it."""

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
    sharing_copy,
)
from prehab_export.deployment import tensor_digests
from prehab_export.pipeline.latency_budget import predicted_latency
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.stages.export import DIGESTS
from prehab_export.system import bar, say, warn, write_json


def compressed_loss(session: Session, calibrated: Calibrated) -> float:
    """Return the held-out loss that the model has after compression; the model itself does not change."""
    truncation = _compress_model(session, calibrated).truncation
    return session.held_out_loss(truncation.apply(sharing_copy(calibrated.model)))


def _compress_model(session: Session, calibrated: Calibrated) -> Compression:
    config = session.config
    samples = Samplesets(session.calibrated_samples, session.held_out, config.data.batch_size, session.workspace.root)
    refines_blocks = config.refine.block_steps > 0
    return compress(
        calibrated,
        samples,
        config.cut,
        after_block=block_refiner(config.refine, calibrated.statistics, seed=config.seed) if refines_blocks else None,
        progress=bar,
    )


def truncate_prepared(session: Session, folder: Path) -> None:
    """Compress the dense model, or that after prehab; write the factored model and ``truncate.json``."""
    model, statistics = session.load_prepared()
    calibrated = session.calibrated(model, statistics)
    selection = coverage(model, calibrated.layers)
    compression = _compress_model(session, calibrated)
    for warning in compression.warnings:
        warn(warning)
    latency = predicted_latency(session, compression.truncation)
    _report_removal(session, compression.truncation, latency)
    compression.truncation.apply(model).float()
    facts = compression.summary() | {
        "total_parameters_before": selection.total,
        "total_parameters_after": sum(parameter.numel() for parameter in model.parameters()),
        "coverage": selection.facts(),
        "predicted_latency": latency,
    }
    if selection.warning is not None:  # `check` has already shown it to the user
        facts["warnings"] = [selection.warning, *facts["warnings"]]
    write_json(folder / "truncate.json", facts)
    save_factored(session, model, folder)


def save_factored(session: Session, model: PreTrainedModel, folder: Path) -> None:
    """Write a factored model to ``model/``, and the digests of its tensors in memory."""
    model.cpu()
    write_json(folder / DIGESTS, tensor_digests(model))
    save_folder(model, folder / "model", session.fresh_processor())


def _report_removal(session: Session, truncation: Truncation, latency: float | None) -> None:
    options, removed = session.config.cut, truncation.summary()["selected_share_removed"]
    goal, achieved = options.ratio, removed
    if options.latency is not None and latency is not None:
        goal, achieved = options.latency, latency
        say(f"  {removed:.0%} of the parameters removed; the layers should take {latency:.0%} of their dense time")
    if abs(achieved - goal) > 0.03:
        warn(f"{achieved:.0%} instead of the requested {goal:.0%}: ranks are integers and have a minimum")
