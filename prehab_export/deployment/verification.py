"""Verification of an exported folder: it is reopened the way a user will, and held to what was in memory."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from converters.dtypes import main_dtype, name_of
from converters.folder import from_pretrained
from prehab_export.deployment.parity import (
    TOLERANCE,
    check_tensor_digests,
    compare_logits,
    load_reference,
    tensor_digests,
)
from prehab_export.inputs import Task, torch_predictor
from prehab_export.system import ParityError


def reloaded(export: Path, task: Task, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The exported folder as ``from_pretrained`` gives it back: every tensor bit for bit, and the same answers.

    Tensors are compared in the dtype in which they are stored; answers, and all that is done with the model, are of
    the same weights in float32.

    Args:
        export: holds the folder, ``model/``, and the reference that it is held to (`save_reference`).

    Returns:
        The model in float32, and the figures of the check.

    Raises:
        ParityError: a reloaded tensor or answer differs.
    """
    reference = load_reference(export)
    model = from_pretrained(export / "model", trust_remote_code=trust_remote_code)
    check_tensor_digests(reference.digests, tensor_digests(model))
    dtype = main_dtype(model)
    if dtype != torch.float32:  # loaded anew, since what is made along the way depends on the dtype too
        model = from_pretrained(export / "model", dtype=torch.float32, trust_remote_code=trust_remote_code)
    predict = torch_predictor(model, task)
    answers = [
        compare_logits(batch, logits, predict(batch), task)
        for batch, logits in zip(reference.batches, reference.logits, strict=True)
    ]
    worst = max(answer.relative for answer in answers)
    if not all(answer.relative <= TOLERANCE for answer in answers):
        raise ParityError(f"the reloaded model answers differently: max |Δ| is {worst:.2e} of the logits' scale")
    facts = {"tensors": len(reference.digests), "dtype": name_of(dtype), "exact": True, "max_relative": worst}
    return model, facts
