"""The truncation stage, and functions that the training stages share with it."""

from dataclasses import replace
from pathlib import Path

import torch
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
from prehab_export.system import alone, bar, say, team, warn, write_json


def compressed_loss(session: Session, calibrated: Calibrated) -> float:
    """Return the held-out loss that the model has after compression; the model itself does not change.

    Of processes that work together, the first one compresses, and all get the loss.
    """
    loss = None
    if team().leads:
        with alone():
            truncation = _compress_model(session, calibrated).truncation
            loss = session.held_out_loss(truncation.apply(sharing_copy(calibrated.model)))
    loss = team().from_first(loss)
    assert loss is not None
    return loss


def _compress_model(session: Session, calibrated: Calibrated, save_to: Path | None = None) -> Compression:
    config = session.config
    folders = replace(session.folders, save_to=save_to)
    samples = Samplesets(session.calibrated_samples, session.held_out, config.data.batch_size, folders)
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
    # The factors of each block are written when it is done, so that a run that is killed goes on at the next.
    compression = _compress_model(session, calibrated, session.workspace.unfinished / "factors")
    if not session.workspace.writable:
        return
    for warning in compression.warnings:
        warn(warning)
    latency = predicted_latency(session, compression.truncation)
    _report_removal(session, compression.truncation, latency)
    compression.truncation.apply(model, copy=False)
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
    """Write a factored model to ``model/``, and the digests of its tensors in memory, in float32.

    Weights that are stored in half precision are written so, beside factors in float32; they are loaded in float32.
    """
    model.cpu()
    write_json(folder / DIGESTS, tensor_digests(model, torch.float32))
    save_folder(model, folder / "model", session.fresh_processor(), widens=True)


def _report_removal(session: Session, truncation: Truncation, latency: float | None) -> None:
    options, removed = session.config.cut, truncation.summary()["selected_share_removed"]
    goal, achieved = options.ratio, removed
    if options.latency is not None and latency is not None:
        goal, achieved = options.latency, latency
        say(f"  {removed:.0%} of the parameters removed; the layers should take {latency:.0%} of their dense time")
    if abs(achieved - goal) > 0.03:
        warn(f"{achieved:.0%} instead of the requested {goal:.0%}: ranks are integers and have a minimum")
