"""Checks early whether a model can be exported to ONNX, by exporting a small skeleton of it."""

from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedConfig

from converters.errors import InputError
from converters.onnx.export import check_exportable
from converters.onnx.form import GraphForm
from converters.skeleton import skeleton
from prehab_export.inputs import Batch, Samples, Task, empty_model, first_line, make_model, model_inputs

# Tokens per sample in a decoder's trial export; a decoder accepts any number.
TOKENS = 8
# The trial uses the smallest of this many batches of two samples.
CANDIDATES = 4

ADVICE = "to compress it without an ONNX graph, use `prehab-export truncate`, `refine` or `rehab`, which do not export"


def check_exportable_model(
    config: PreTrainedConfig,
    task: Task,
    samples: Samples,
    *,
    text_inputs: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Try to export a skeleton of the model, traced with some of the samples.

    An error of the skeleton itself, before any export, says nothing about the model and is ignored.

    Args:
        text_inputs: names of the tensors that the tokenizer produces; None for images.

    Raises:
        InputError: the model cannot be exported; the message says why, and what is possible without an export.
    """
    build = partial(make_model, task=task, trust_remote_code=trust_remote_code)
    batch = _smallest(samples, task)
    try:
        model = skeleton(config, empty_model(config, task, trust_remote_code=trust_remote_code), build)
        if model is None:
            return
        with torch.no_grad():
            task.logits(model, batch)
    except Exception:  # any kind: the skeleton failed, not the user's model
        return
    try:
        check_exportable(model, task.name, GraphForm(text_inputs), samples=model_inputs(batch))
    except InputError as error:
        raise InputError(f"{error}; {ADVICE}") from error
    except Exception as error:
        if "allocate" in str(error) or isinstance(error, MemoryError):
            return  # out of memory: the skeleton is held in addition to everything else
        kind = type(model).__name__
        reason = first_line(error) if kind in str(error) else f"{kind} cannot be exported: {first_line(error)}"
        raise InputError(f"{reason}; {ADVICE}") from error


def _smallest(samples: Samples, task: Task) -> Batch:
    """Return a batch of at most two samples, cut to the first `TOKENS` tokens for a decoder."""
    size = min(2, len(samples))
    starts = range(0, min(len(samples) - size + 1, CANDIDATES * size), size)
    batches = [next(iter(samples.batches(size, indices=list(range(at, at + size))))) for at in starts]
    batch = min(batches, key=lambda batch: sum(values.numel() for values in batch.values()))
    if task.name != "text-generation":
        return batch
    return {name: values[:, :TOKENS] for name, values in batch.items()}
