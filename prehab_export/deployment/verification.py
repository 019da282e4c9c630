"""Verifies an exported folder: reopens it as a user would and compares it with the model that was in memory."""

from pathlib import Path
from typing import Any

from converters.dtypes import main_dtype, name_of
from prehab_export.deployment.mapped_models import load_mapped
from prehab_export.deployment.parity import (
    TOLERANCE,
    check_tensor_digests,
    compare_logits,
    load_reference,
    tensor_digests,
)
from prehab_export.inputs import Task, torch_predictor
from prehab_export.system import ParityError


def check_reloaded(export: Path, task: Task, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Load the exported folder with ``from_pretrained`` and check that its tensors and outputs are the same.

    Tensors are compared bit for bit in the dtype in which they are stored. Outputs are compared in float32, with the
    same weights.

    Args:
        export: folder with ``model/`` and the reference to compare it with (see `save_reference`).

    Returns:
        The measured differences.

    Raises:
        ParityError: a reloaded tensor or output differs.
    """
    reference = load_reference(export)
    model = load_mapped(export / "model", trust_remote_code=trust_remote_code)
    check_tensor_digests(reference.digests, tensor_digests(model))
    predict = torch_predictor(model, task)
    comparisons = [
        compare_logits(batch, logits, predict(batch), task)
        for batch, logits in zip(reference.batches, reference.logits, strict=True)
    ]
    worst = max(comparison.relative for comparison in comparisons)
    if not all(comparison.relative <= TOLERANCE for comparison in comparisons):
        raise ParityError(f"the reloaded model answers differently: max |Δ| is {worst:.2e} of the logits' scale")
    dtype = name_of(main_dtype(model))
    return {"tensors": len(reference.digests), "dtype": dtype, "exact": True, "max_relative": worst}
