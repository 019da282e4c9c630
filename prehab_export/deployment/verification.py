"""Verifies an exported folder: reopens it as a user would and compares it with the model that was in memory."""

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
    """Load the exported folder with ``from_pretrained`` and check that its tensors and outputs are the same.

    Tensors are compared bit for bit in the dtype in which they are stored. Outputs are compared in float32, with the
    same weights; the returned model is in float32 too.

    Args:
        export: folder with ``model/`` and the reference to compare it with (see `save_reference`).

    Returns:
        The model in float32, and the measured differences.

    Raises:
        ParityError: a reloaded tensor or output differs.
    """
    reference = load_reference(export)
    model = from_pretrained(export / "model", trust_remote_code=trust_remote_code)
    check_tensor_digests(reference.digests, tensor_digests(model))
    dtype = main_dtype(model)
    if dtype != torch.float32:  # loaded again, because buffers computed during loading depend on the dtype too
        model = from_pretrained(export / "model", dtype=torch.float32, trust_remote_code=trust_remote_code)
    predict = torch_predictor(model, task)
    comparisons = [
        compare_logits(batch, logits, predict(batch), task)
        for batch, logits in zip(reference.batches, reference.logits, strict=True)
    ]
    worst = max(comparison.relative for comparison in comparisons)
    if not all(comparison.relative <= TOLERANCE for comparison in comparisons):
        raise ParityError(f"the reloaded model answers differently: max |Δ| is {worst:.2e} of the logits' scale")
    facts = {"tensors": len(reference.digests), "dtype": name_of(dtype), "exact": True, "max_relative": worst}
    return model, facts
