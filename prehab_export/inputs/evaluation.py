"""Quality of a model on data: one function for a torch model and for an ONNX graph."""

import math
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from converters.errors import InputError
from converters.number_formats import ARRAY_FORMATS
from prehab_export.inputs.devices import device_of, moved
from prehab_export.inputs.tasks import Batch, Task, sample_count
from prehab_export.system import Progress, silent

if TYPE_CHECKING:  # a torch model is measured without loading onnxruntime
    from onnxruntime import InferenceSession

Predict = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Metrics:
    """metric: its name; value: an accuracy in [0, 1], or a perplexity; loss: mean cross-entropy in nats over
    ``units`` (samples, or predicted tokens); samples: rows or windows looked at."""

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
    progress: Progress = silent,
) -> Metrics:
    """Mean loss and metric of ``predict`` (batch → logits) over the batches.

    Raises:
        InputError: there is no unit to judge by.
        FloatingPointError: a loss is NaN or Inf; the message names the batch and the sample in it.
    """
    loss, correct, units, samples = 0.0, 0, 0, 0
    steps = len(batches) if isinstance(batches, Sized) else 0
    with progress("evaluate", steps) as advance:
        for number, batch in enumerate(batches):
            logits = predict(batch)
            batch = moved(batch, logits.device)
            for row in range(sample_count(batch)):
                # Row by row: the logits of a large vocabulary are the biggest tensor here and are not copied whole.
                one = {name: value[row : row + 1] for name, value in batch.items()}
                losses = task.losses(logits[row : row + 1], one)
                if not losses.isfinite().all():
                    raise FloatingPointError(
                        f"the loss is NaN or Inf on sample {row} of batch {number}; "
                        "the model overflows or holds broken weights"
                    )
                loss += losses.sum(dtype=torch.float64).item()
                units += len(losses)
                if task.metric == "accuracy":
                    guesses = task.unit_logits(logits[row : row + 1], one).argmax(-1)
                    correct += int((guesses == task.unit_labels(one)).sum())
            samples += sample_count(batch)
            advance()
    if not units:
        raise InputError("nothing to evaluate on: the data has no sample with a label, or no window of two tokens")
    mean = loss / units
    value = correct / units if task.metric == "accuracy" else _perplexity(mean)
    return Metrics(task.metric, value, mean, units, samples)


def _perplexity(mean_loss: float) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf


def torch_predictor(model: nn.Module, task: Task) -> Predict:
    """The model in evaluation mode, on the device it lies on and in the task's precision; logits stay as they are."""
    device = device_of(model)
    model.eval()

    @torch.inference_mode()
    def predict(batch: Batch) -> Tensor:
        return task.logits(model, moved(batch, device))

    return predict


def divergences(predict: Predict, reference: Predict, task: Task, batches: Iterable[Batch]) -> Tensor:
    """KL(reference ‖ predict) of every sample, mean over its units, in nats; labels are not looked at.

    Samples without a unit count as 0. Returns a float64 vector.
    """
    values = []
    for batch in batches:
        own, target = predict(batch), reference(batch)
        batch = moved(batch, own.device)
        for row in range(sample_count(batch)):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            log_p, log_q = (task.unit_logits(x[row : row + 1], one).double().log_softmax(-1) for x in (target, own))
            values.append((log_p.exp() * (log_p - log_q)).sum() / max(1, len(log_p)))
    return torch.stack(values).cpu()


def onnx_predictor(session: "InferenceSession", task: Task) -> Predict:
    """An ONNX graph with an output ``logits``.

    Only the session's own inputs are fed. A decoder with a cache gets an empty one, and positions counted from
    the attention mask: one prefill, no decoding.

    Raises:
        InputError: the graph has no output ``logits``, or (at the first batch) an input that nothing is known of.
    """
    nodes = session.get_inputs()
    outputs = [node.name for node in session.get_outputs()]
    if "logits" not in outputs:
        raise InputError(f"the graph has no output 'logits' to judge {task.name} by, only {', '.join(outputs)}")

    def predict(batch: Batch) -> Tensor:
        return torch.from_numpy(session.run(["logits"], feeds_of(nodes, batch))[0])

    return predict


def feeds_of(inputs: Sequence[Any], batch: Batch) -> dict[str, np.ndarray]:
    """What a graph with these inputs is fed for this batch.

    Raises:
        InputError: an input that nothing is known of.
    """
    return {node.name: _feed(node, batch) for node in inputs}


def _feed(node: Any, batch: Batch) -> np.ndarray:
    if node.type not in ARRAY_FORMATS:
        raise InputError(f"the graph's input {node.name} is a {node.type}, which NumPy cannot hold")
    dtype = np.dtype(ARRAY_FORMATS[node.type])
    if node.name.startswith("past_key_values."):
        lengths = [size if isinstance(size, int) else 0 for size in node.shape[1:]]
        return np.zeros([sample_count(batch), *lengths], dtype)
    if node.name in batch:
        return batch[node.name].cpu().numpy().astype(dtype, copy=False)
    if node.name not in _DERIVED or "input_ids" not in batch:
        raise InputError(f"the graph takes an input {node.name}, which the data does not have")
    return _DERIVED[node.name](batch).cpu().numpy().astype(dtype, copy=False)


def _mask(batch: Batch) -> Tensor:
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"]))


def _positions(batch: Batch) -> Tensor:
    return (_mask(batch).cumsum(-1) - 1).clamp(min=0)


# Inputs that a graph may declare and a batch leaves out, from what the batch has.
_DERIVED: dict[str, Callable[[Batch], Tensor]] = {
    "attention_mask": _mask,
    "position_ids": _positions,
    "token_type_ids": lambda batch: torch.zeros_like(batch["input_ids"]),
}
