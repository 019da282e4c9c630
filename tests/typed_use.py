"""Checked by mypy and never run: users of the package see real signatures, not lazy ones of unknown type."""

from typing import assert_type

from torch import nn

import prehab_export as px


def compress_a_model(model: nn.Module, data: px.TaskData) -> px.Truncation:
    task = px.TASKS["text-classification"]
    calibrated = px.calibrate(model, task, data.train.batches(32), progress=px.bar)
    assert_type(calibrated, px.Calibrated)
    compression = px.compress(calibrated, px.Samplesets(data.train, data.evaluation), px.TruncateConfig())
    assert_type(compression, px.Compression)
    return compression.truncation


def mistakes_are_found(model: nn.Module) -> None:
    # Each of these is ignored because it is an error; an ignored line without one is an error in itself.
    px.calibrate(model)  # type: ignore[call-arg]
    px.TruncateConfig(ratio="much")  # type: ignore[arg-type]
    px.truncate(model, px.TruncateConfig())  # type: ignore[arg-type]
    px.unknown_name  # type: ignore[attr-defined]  # noqa: B018
