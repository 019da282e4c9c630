"""The stages before compression: merging an adapter and gathering moments."""

import warnings
from math import ceil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from converters.adapters import merge_dense_adapter
from converters.folder import save_folder
from converters.lowrank import dense_weight
from converters.model_config import ties_embeddings
from converters.publishing import move_together
from prehab_export.compression import (
    CalibrationWarning,
    Gather,
    Statistics,
    calibrate,
    doubts,
    moments_size,
    needed_samples,
)
from prehab_export.inputs import Samples, check_runs, device_of, room_for
from prehab_export.pipeline.session import STATISTICS, Session
from prehab_export.system import bar, named, say, team, warn, write_json

# Samples of the pilot, and how many more are used than it says are needed: it is small, so that it may be wrong.
PILOT, MARGIN = 16, 1.25


def merge_adapter(session: Session, folder: Path) -> None:
    """Merge the run's adapter into the source model and write it to ``model/``."""
    model = session.load_source_model()
    tied = ties_embeddings(model.config)
    merge_dense_adapter(model, Path(str(session.config.adapter)))
    if tied and not ties_embeddings(model.config):
        say("  the adapter changes embedding and head differently: they are no longer tied, and both are stored")
    save_folder(model, folder / "model", session.fresh_processor())


def calibrate_dense(session: Session, folder: Path) -> None:
    """Gather the dense model's moments on the calibration samples; write them and ``calibrate.json``."""
    model = session.load_dense(as_stored=True)
    check_runs(model, session.task, session.calibration)
    samples = _enough_samples(session, model)
    # They are written block by block, so that a run that is killed goes on at the next.
    statistics = gather_statistics(session, model, samples, save_to=session.workspace.unfinished / STATISTICS)
    team().wait()  # nobody reads them any more where they are
    if not session.workspace.writable:
        return
    warning_messages = doubts(statistics)
    for message in warning_messages:
        warn(message)
    facts = {
        "samples": len(samples),
        "tokens": {group: moment.tokens for group, moment in statistics.inputs.items()},
        "layers": len(statistics.groups),
        "input_groups": len(statistics.inputs),
        "groups": statistics.groups,
        "gradient_units": statistics.units,
        "warnings": warning_messages,
    }
    write_json(folder / "calibrate.json", facts)
    move_together(session.workspace.unfinished, folder / STATISTICS)


def _enough_samples(session: Session, model: PreTrainedModel) -> Samples:
    """Return as many of the calibration samples as the layers need, judged by a pilot without gradients."""
    samples = session.calibration
    if not session.config.calibrate.enough or len(samples) <= 2 * PILOT:
        return samples
    batches = samples.first(PILOT).batches(session.config.data.batch_size)
    gather = Gather(gradients=False, scratch=session.workspace.root, limits=session.memory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        pilot = calibrate(
            model, session.task, batches, session.layers(model), gather=gather, progress=named(bar, "pilot")
        )
    count = max(PILOT, ceil(MARGIN * needed_samples(pilot.statistics)))
    if count >= len(samples):
        return samples
    say(f"  {count} of {len(samples)} calibration samples are enough: no layer needs more independent tokens")
    return samples.first(count)


def gather_statistics(
    session: Session, model: PreTrainedModel, samples: Samples, save_to: Path | None = None
) -> Statistics:
    """Gather a model's moments on these samples, with output gradients if the options need them.

    Args:
        save_to: new folder for the moments; by default they stay in memory.
    """
    options = session.config
    layers = session.layers(model)
    shapes = ((w.shape[0], w.shape[1]) for w in map(dense_weight, layers.values()))
    device = device_of(model)
    room = room_for(moments_size(shapes, options.needs_gradients), device)
    gather = Gather(
        gradients=options.needs_gradients,
        labels=options.calibrate.labels,
        gradient_units=options.calibrate.gradient_units,
        keep_on=device if all(team().from_each(room == device)) else torch.device("cpu"),
        scratch=session.workspace.root,
        limits=session.memory,
        save_to=save_to,
    )
    batches = samples.batches(options.data.batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # `calibrate_dense` reports it once
        calibration = calibrate(model, session.task, batches, layers, gather=gather, seed=options.seed, progress=bar)
    return calibration.statistics
