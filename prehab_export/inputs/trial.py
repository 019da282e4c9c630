"""Checks early that a model runs on the data, with two samples."""

import torch
from transformers import PreTrainedModel

from converters.errors import InputError
from prehab_export.inputs.data.samples import Samples
from prehab_export.inputs.devices import device_of, moved
from prehab_export.inputs.model_source import first_line
from prehab_export.inputs.tasks import Task, model_inputs


def check_runs(model: PreTrainedModel, task: Task, samples: Samples) -> None:
    """Check that the model runs on the first two samples.

    Raises:
        InputError: it does not; the message has the model's own error and the names of the inputs.
    """
    batch = next(iter(samples.batches(min(2, len(samples)))))
    try:
        with torch.no_grad():
            task.logits(model, moved(batch, device_of(model)))
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate" in str(error):
            raise
        names, source = ", ".join(model_inputs(batch)), "image processor" if "pixel_values" in batch else "tokenizer"
        raise InputError(
            f"{type(model).__name__} does not run on the data ({type(error).__name__}: {first_line(error)}). "
            f"Its inputs are {names}, from its {source}: check that this {source} and config.json belong to the model, "
            "with the special tokens or sizes that it was trained with; a model that needs other inputs cannot be "
            "compressed"
        ) from error
