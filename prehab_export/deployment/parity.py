"""Checks that a written model computes what the model in memory computes.

A `Reference` keeps inputs and outputs of the model in memory, so that graphs and folders can be compared with it later.
"""

import hashlib
import inspect
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from converters.errors import InputError
from converters.model_config import positions
from converters.onnx.generate import decode_along
from converters.onnx.runtime import open_session
from prehab_export.inputs import Batch, Samples, Task, onnx_predictor
from prehab_export.system import ParityError

# Largest |Δ| of float32 logits, relative to the largest logit. Summation order alone accounts for about 1e-6.
TOLERANCE = 1e-4
GREEDY_TOKENS = 24


@dataclass(frozen=True)
class Continuation:
    """A prompt (1×T), the K most likely tokens that follow it (1×K), and the logits of each choice (1×K×V)."""

    prompt: Tensor
    tokens: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Reference:
    """Outputs of the model in memory: real batches of several shapes, their logits, a digest of every tensor and, for a
    decoder, a greedy continuation."""

    batches: list[Batch]
    logits: list[Tensor]
    digests: dict[str, str]
    greedy: Continuation | None = None


@dataclass(frozen=True)
class GreedyComparison:
    """A graph's logits when it decodes the reference's tokens with its own cache.

    relative: largest difference, divided by the largest reference logit.
    differing: positions at which the graph would have picked another token.
    """

    relative: float
    differing: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """Largest difference on one batch; ``relative`` is divided by the largest reference logit."""

    shape: dict[str, list[int]]
    max_abs: float
    relative: float


def reference_batches(model: PreTrainedModel, task: Task, samples: Samples) -> list[Batch]:
    """Return real inputs of several shapes: batches of 1, 2 and 5, for a decoder of several lengths and left-padded."""
    sizes = [min(size, len(samples)) for size in (1, 2, 5)]
    batches = [next(iter(samples.batches(size, indices=list(range(size))))) for size in sizes]
    if task.name != "text-generation":
        return batches
    length = batches[0]["input_ids"].shape[1]
    shortened = [
        {key: value[:, :size] for key, value in batch.items()}
        for batch, size in zip(batches, (length, max(2, length // 3), max(2, length // 2)), strict=True)
    ]
    padded = {key: value.clone() for key, value in shortened[-1].items()}
    padded["attention_mask"] = torch.ones_like(padded["input_ids"])
    padded["attention_mask"][0, : shortened[-1]["input_ids"].shape[1] // 3] = 0
    # Without explicit positions, GPT-2 and similar models count padding too.
    if "position_ids" in inspect.signature(model.forward).parameters:
        padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return [*shortened, padded]


@torch.inference_mode()
def reference_of(model: PreTrainedModel, task: Task, batches: list[Batch]) -> Reference:
    """Run the model in memory on these batches and keep its outputs."""
    logits = [task.logits(model, batch).float().cpu().contiguous() for batch in batches]
    greedy = _greedy(model, batches[0]["input_ids"]) if task.name == "text-generation" else None
    return Reference(batches, logits, tensor_digests(model), greedy)


def tensor_digests(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Return the SHA-256 of every tensor of the state dict, over dtype, shape and values.

    Args:
        dtype: dtype to convert floating-point tensors to first; by default they stay as they are.
    """

    def digest(tensor: Tensor) -> str:
        tensor = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(data.data)
        return digest.hexdigest()

    return {name: digest(tensor) for name, tensor in model.state_dict().items()}


def check_tensor_digests(expected: dict[str, str], actual: dict[str, str]) -> None:
    """Check that two models hold the same tensors, bit for bit.

    Raises:
        ParityError: a tensor on disk is not the one that was in memory.
    """
    different = sorted(name for name in expected | actual if expected.get(name) != actual.get(name))
    if different:
        raise ParityError(
            f"{len(different)} tensors differ after reloading the safetensors folder, the first is {different[0]}"
        )


def compare(reference: Reference, task: Task, session: onnxruntime.InferenceSession) -> list[Comparison]:
    """Compare the ONNX graph with the reference, batch by batch; padding does not count."""
    predict = onnx_predictor(session, task)
    return [
        compare_logits(batch, expected, predict(batch), task)
        for batch, expected in zip(reference.batches, reference.logits, strict=True)
    ]


def compare_logits(batch: Batch, expected: Tensor, actual: Tensor, task: Task) -> Comparison:
    """Compare the logits of one batch; padding does not count."""
    difference = (actual.float().cpu() - expected).abs()
    mask = task.token_mask(batch)
    if mask is not None and difference.shape[:2] == mask.shape:
        difference, expected = difference[mask], expected[mask]
    largest = float(difference.max())
    shape = {key: list(value.shape) for key, value in batch.items() if key != "labels"}
    return Comparison(shape, largest, largest / max(float(expected.abs().max()), 1e-12))


def compare_greedy(reference: Reference, session: onnxruntime.InferenceSession) -> GreedyComparison | None:
    """Compare the graph with the reference along its continuation; None if the reference has none.

    Two tokens may be equally likely up to rounding. The graph is therefore always fed the reference's token, whichever
    it would have picked, and only the difference of the logits counts.
    """
    if (greedy := reference.greedy) is None:
        return None
    actual = torch.from_numpy(decode_along(session, greedy.prompt.numpy(), greedy.tokens.numpy())).float()
    largest = float((actual - greedy.logits).abs().max())
    relative = largest / max(float(greedy.logits.abs().max()), 1e-12)
    differing = (actual.argmax(-1) != greedy.tokens).any(0).nonzero().flatten()
    return GreedyComparison(relative, tuple(differing.tolist()))


def check_graph(reference: Reference, task: Task, path: Path, threads: int) -> dict[str, Any]:
    """Check a graph against the reference: the logits of every batch, and greedy decoding with the graph's own cache.

    Returns:
        The measured differences.

    Raises:
        ParityError: ONNX Runtime cannot run the graph, or the graph computes something else.
    """
    try:
        session = open_session(path, threads)
        results = compare(reference, task, session)
        greedy = compare_greedy(reference, session)
    except InputError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no other base class in common
        raise ParityError(f"ONNX Runtime cannot run {path.parent.name}/{path.name}: {error}") from error
    for result in results:
        if not result.relative <= TOLERANCE:  # written this way so that NaN fails too
            raise ParityError(
                f"{path.name} is off by {result.relative:.2e} of the logits' scale on inputs {result.shape}; "
                f"at most {TOLERANCE:.0e} is allowed"
            )
    figures: dict[str, Any] = {"max_relative": max(result.relative for result in results)}
    if greedy is not None:
        if not greedy.relative <= TOLERANCE:
            tokens = ", and it does not generate the same greedy tokens as PyTorch" if greedy.differing else ""
            raise ParityError(
                f"{path.name} is off by {greedy.relative:.2e} of the logits' scale when it decodes from its own "
                f"cache{tokens}; at most {TOLERANCE:.0e} is allowed"
            )
        # The logits agree within the tolerance but rank another token first: both tokens were equally likely.
        figures |= {"greedy_max_relative": greedy.relative, "greedy_near_ties": len(greedy.differing)}
    identical = None if greedy is None else not greedy.differing
    return figures | {"greedy_tokens_identical": identical, "shapes": [asdict(result) for result in results]}


def save_reference(reference: Reference, folder: Path) -> None:
    """Write the reference to ``reference.safetensors`` in the folder."""
    tensors: dict[str, Tensor] = {}
    for index, (batch, logits) in enumerate(zip(reference.batches, reference.logits, strict=True)):
        tensors |= {f"{index}/{key}": value.contiguous() for key, value in batch.items()} | {f"{index}//logits": logits}
    if reference.greedy is not None:
        tensors |= {f"greedy/{name}": value for name, value in vars(reference.greedy).items()}
    # One metadata entry: the order of several is arbitrary, and the same reference must give the same file.
    facts = {"reference": json.dumps({"batches": len(reference.batches), "digests": reference.digests})}
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "reference.safetensors", metadata=facts)


def load_reference(folder: Path) -> Reference:
    """Read what `save_reference` wrote."""
    batches: list[Batch] = []
    logits = []
    with safe_open(folder / "reference.safetensors", framework="pt") as file:
        facts, names = json.loads(file.metadata()["reference"]), list(file.keys())
        for index in range(facts["batches"]):
            prefix = f"{index}/"
            tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)}
            logits.append(tensors.pop("/logits"))
            batches.append(tensors)
        greedy = None
        if "greedy/prompt" in names:
            greedy = Continuation(*(file.get_tensor(f"greedy/{part.name}") for part in fields(Continuation)))
    return Reference(batches, logits, facts["digests"], greedy)


def _greedy(model: PreTrainedModel, prompt: Tensor) -> Continuation:
    """Decode greedily, token by token. ``generate`` would apply the model's own penalties and stop conditions."""
    prompt = prompt[:1, : max(1, min(16, prompt.shape[1] // 2))]
    limit = positions(model.config) or 10**9
    step, past, tokens, logits = prompt.to(model.device), None, [], []
    for _ in range(max(1, min(GREEDY_TOKENS, limit - prompt.shape[1]))):
        output: Any = model(input_ids=step, past_key_values=past, use_cache=True)
        logits.append(output.logits[:, -1:])
        step, past = logits[-1].argmax(-1), output.past_key_values
        tokens.append(step)
    return Continuation(prompt.cpu(), torch.cat(tokens, 1).cpu(), torch.cat(logits, 1).float().cpu())
