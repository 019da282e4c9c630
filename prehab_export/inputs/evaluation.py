"""Measures the quality of a model on data, with one function for torch models and ONNX graphs."""

import math
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from converters.errors import InputError
from converters.number_formats import ARRAY_FORMATS
from prehab_export.inputs.batch_splitting import micro_batches
from prehab_export.inputs.devices import device_of, moved
from prehab_export.inputs.tasks import Batch, Task, sample_count
from prehab_export.system import Progress, silent, team

if TYPE_CHECKING:  # evaluating a torch model must not import onnxruntime
    from onnxruntime import InferenceSession

Predict = Callable[[Batch], Tensor]
# Positions whose logits are computed together: 128 MB of them for 32k words.
_POSITIONS = 1024


@dataclass(frozen=True)
class Metrics:
    """The quality of a model on a set of samples.

    metric: name of the metric.
    value: accuracy in [0, 1], or perplexity.
    loss: mean cross-entropy in nats.
    units: number of samples, or predicted tokens, that the loss is averaged over.
    samples: number of rows or windows evaluated.
    """

    metric: str
    value: float
    loss: float
    units: int
    samples: int


def evaluate(
    predict: Predict,
    task: Task,
    batches: Iterable[Batch],
    *,
    positions: int | None = None,
    progress: Progress = silent,
) -> Metrics:
    """Return the mean loss and the metric of ``predict`` (batch → logits) over the batches.

    Processes that work together evaluate a share of the batches each, and all return the same metrics.

    Args:
        positions: the most positions to predict together, unless one sample has more; by default whole batches or, for
            logits of a whole vocabulary, a few windows.

    Raises:
        InputError: the batches contain no unit of loss.
        FloatingPointError: a loss is NaN or Inf; the message gives the sample's number.
    """
    loss, correct, units, samples = 0.0, 0, 0, 0
    steps = len(batches) if isinstance(batches, Sized) else 0
    if task.metric == "perplexity":
        positions = min(_POSITIONS, positions or _POSITIONS)
    with progress("evaluate", steps) as advance:
        for batch in islice(batches, team().rank, None, team().size):
            # The logits of a large vocabulary are the largest tensor here: they are computed for a few windows at a
            # time, and never copied whole.
            for part in [batch] if positions is None else micro_batches([batch], positions):
                logits = predict(part)
                part = moved(part, logits.device)
                for row in range(sample_count(part)):
                    sample = {name: value[row : row + 1] for name, value in part.items()}
                    losses = task.losses(logits[row : row + 1], sample)
                    if not losses.isfinite().all():
                        raise FloatingPointError(
                            f"the loss is NaN or Inf on sample {samples + row}; "
                            "the model overflows or holds broken weights"
                        )
                    loss += losses.sum(dtype=torch.float64).item()
                    units += len(losses)
                    if task.metric == "accuracy":
                        predictions = task.unit_logits(logits[row : row + 1], sample).argmax(-1)
                        correct += int((predictions == task.unit_labels(sample)).sum())
                samples += sample_count(part)
            advance()
    loss, *counts = team().totals([loss, correct, units, samples])
    correct, units, samples = map(int, counts)
    if not units:
        raise InputError("nothing to evaluate: the data has no sample with a label, or no window of two tokens")
    mean = loss / units
    value = correct / units if task.metric == "accuracy" else _perplexity(mean)
    return Metrics(task.metric, value, mean, units, samples)


def _perplexity(mean_loss: float) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf


def torch_predictor(model: nn.Module, task: Task) -> Predict:
    """Put the model into evaluation mode and return batch → logits, on the model's device, in the task's precision."""
    device = device_of(model)
    model.eval()

    @torch.inference_mode()
    def predict(batch: Batch) -> Tensor:
        return task.logits(model, moved(batch, device))

    return predict


def divergences(predict: Predict, reference: Predict, task: Task, batches: Iterable[Batch]) -> Tensor:
    """Return KL(reference ‖ predict) of every sample in nats, averaged over the sample's units, as a float64 vector.

    Labels are not used. A sample without units counts as 0.
    """
    values = []
    for batch in batches:
        logits, reference_logits = predict(batch), reference(batch)
        batch = moved(batch, logits.device)
        for row in range(sample_count(batch)):
            sample = {name: value[row : row + 1] for name, value in batch.items()}
            log_p, log_q = (
                task.unit_logits(x[row : row + 1], sample).double().log_softmax(-1) for x in (reference_logits, logits)
            )
            values.append((log_p.exp() * (log_p - log_q)).sum() / max(1, len(log_p)))
    return torch.stack(values).cpu()


def onnx_predictor(session: "InferenceSession", task: Task) -> Predict:
    """Return batch → logits for an ONNX graph with an output ``logits``.

    Only inputs that the session declares are fed. A decoder with a cache gets an empty cache, and positions counted
    from the attention mask: one prefill, no decoding.

    Raises:
        InputError: the graph has no output ``logits``, or (at the first batch) an unknown input.
    """
    nodes = session.get_inputs()
    outputs = [node.name for node in session.get_outputs()]
    if "logits" not in outputs:
        raise InputError(f"the graph has no output 'logits', which {task.name} needs, only {', '.join(outputs)}")

    def predict(batch: Batch) -> Tensor:
        return torch.from_numpy(session.run(["logits"], feeds_of(nodes, batch))[0])

    return predict


def feeds_of(inputs: Sequence[Any], batch: Batch) -> dict[str, np.ndarray]:
    """Build the feeds of a graph with these inputs from a batch: input name → array.

    Raises:
        InputError: an input is neither in the batch nor can be derived from it.
    """
    return {node.name: _feed(node, batch) for node in inputs}


def _feed(node: Any, batch: Batch) -> np.ndarray:
    if node.type not in ARRAY_FORMATS:
        raise InputError(f"the graph's input {node.name} has type {node.type}, which NumPy cannot hold")
    dtype = np.dtype(ARRAY_FORMATS[node.type])
    if node.name.startswith("past_key_values."):
        lengths = [size if isinstance(size, int) else 0 for size in node.shape[1:]]
        return np.zeros([sample_count(batch), *lengths], dtype)
    if node.name in batch:
        return batch[node.name].cpu().numpy().astype(dtype, copy=False)
    if node.name not in _DERIVED or "input_ids" not in batch:
        raise InputError(f"the graph needs an input {node.name}, which the data does not have")
    return _DERIVED[node.name](batch).cpu().numpy().astype(dtype, copy=False)


def _mask(batch: Batch) -> Tensor:
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"]))


def _positions(batch: Batch) -> Tensor:
    return (_mask(batch).cumsum(-1) - 1).clamp(min=0)


# How to derive inputs that a graph may declare and a batch may lack.
_DERIVED: dict[str, Callable[[Batch], Tensor]] = {
    "attention_mask": _mask,
    "position_ids": _positions,
    "token_type_ids": lambda batch: torch.zeros_like(batch["input_ids"]),
}
