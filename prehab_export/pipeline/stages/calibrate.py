"""The stages before compression: merging an adapter and gathering moments."""

import warnings
from pathlib import Path

from transformers import PreTrainedModel

from converters.adapters import merge_dense_adapter
from converters.folder import save_folder
from converters.lowrank import dense_weight
from converters.model_config import ties_embeddings
from prehab_export.compression import CalibrationWarning, Gather, Statistics, calibrate, doubts, moments_size
from prehab_export.inputs import check_runs, device_of, room_for
from prehab_export.pipeline.session import STATISTICS, Session
from prehab_export.system import bar, say, warn, write_json


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
    statistics = gather_statistics(session, model, save_to=folder / STATISTICS)
    warning_messages = doubts(statistics)
    for message in warning_messages:
        warn(message)
    facts = {
        "samples": len(session.calibration),
        "tokens": {group: moment.tokens for group, moment in statistics.inputs.items()},
        "layers": len(statistics.groups),
        "input_groups": len(statistics.inputs),
        "groups": statistics.groups,
        "gradient_units": statistics.units,
        "warnings": warning_messages,
    }
    write_json(folder / "calibrate.json", facts)


def gather_statistics(session: Session, model: PreTrainedModel, save_to: Path | None = None) -> Statistics:
    """Gather a model's moments on the calibration samples, with output gradients if the options need them.

    Args:
        save_to: new folder for the moments; by default they stay in memory.
    """
    options = session.config
    layers = session.layers(model)
    shapes = ((w.shape[0], w.shape[1]) for w in map(dense_weight, layers.values()))
    gather = Gather(
        gradients=options.needs_gradients,
        labels=options.calibrate.labels,
        keep_on=room_for(moments_size(shapes, options.needs_gradients), device_of(model)),
        scratch=session.workspace.root,
        save_to=save_to,
    )
    batches = session.calibration.batches(options.data.batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # `calibrate_dense` reports it once
        calibration = calibrate(model, session.task, batches, layers, gather=gather, seed=options.seed, progress=bar)
    return calibration.statistics
