"""Can the model be exported at all? Found out on a skeleton of it."""

from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedConfig

from converters.errors import InputError
from converters.onnx.export import check_exportable
from converters.onnx.form import GraphForm
from converters.skeleton import skeleton
from prehab_export.inputs import Batch, Samples, Task, empty_model, first_line, make_model, model_inputs

# Tokens of a sample that a decoder is tried with; it takes any number.
TOKENS = 8
# Batches of two samples among which the smallest is taken.
CANDIDATES = 4

ADVICE = "to compress it without an ONNX graph, use `prehab-export truncate`, `refine` or `rehab`, which end before it"


def check_exportable_model(
    config: PreTrainedConfig,
    task: Task,
    samples: Samples,
    *,
    text_inputs: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Try the export on a skeleton of the model, with some of the samples.

    What goes wrong with the skeleton itself, before any export, says nothing of the model and is passed over.

    Args:
        text_inputs: names that the tokenizer gives; None for images.

    Raises:
        InputError: why it cannot be exported, and what can be done without.
    """
    build = partial(make_model, task=task, trust_remote_code=trust_remote_code)
    batch = _smallest(samples, task)
    try:
        model = skeleton(config, empty_model(config, task, trust_remote_code=trust_remote_code), build)
        if model is None:
            return
        with torch.no_grad():
            task.logits(model, batch)
    except Exception:  # of whatever kind: it is not the user's model that failed
        return
    try:
        check_exportable(model, task.name, GraphForm(text_inputs), samples=model_inputs(batch))
    except InputError as error:
        raise InputError(f"{error}; {ADVICE}") from error
    except Exception as error:
        if "allocate" in str(error) or isinstance(error, MemoryError):
            return  # the skeleton's, which is held beside all else
        kind = type(model).__name__
        reason = first_line(error) if kind in str(error) else f"{kind} cannot be exported: {first_line(error)}"
        raise InputError(f"{reason}; {ADVICE}") from error


def _smallest(samples: Samples, task: Task) -> Batch:
    """Two samples, and of a text for a decoder the beginning."""
    size = min(2, len(samples))
    starts = range(0, min(len(samples) - size + 1, CANDIDATES * size), size)
    batches = [next(iter(samples.batches(size, indices=list(range(at, at + size))))) for at in starts]
    batch = min(batches, key=lambda batch: sum(values.numel() for values in batch.values()))
    if task.name != "text-generation":
        return batch
    return {name: values[:, :TOKENS] for name, values in batch.items()}
