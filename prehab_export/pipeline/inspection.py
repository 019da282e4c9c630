"""Inspection of a model or an artifact: its layers, the inputs that they share, and how compressible they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from converters.coverage import coverage
from converters.folder import from_pretrained
from converters.lowrank import DenseLinear, LowRankLinear, dense_weight, low_rank_layers, shared_groups
from converters.model_config import USUAL_IMAGE_SIZE, compression, image_size
from converters.onnx.inputs import image_inputs, text_inputs
from converters.registration import ranks_of
from converters.selection import select_layers
from prehab_export.compression import shared_inputs
from prehab_export.inputs import Batch, Task, load_config, load_model, task_of
from prehab_export.linalg import break_even
from prehab_export.pipeline.session import quiet_libraries

# The share of ‖W‖_F² that ``rank_of_99_percent`` singular values hold.
ENERGY = 0.99


def inspect_model(
    path: str,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Describe a dense model, a compressed folder, or the artifact in a run's folder.

    Args:
        path: a folder or a model name of the Hugging Face hub.
        include: patterns of layers to select.
        exclude: patterns of layers to leave out.
        revision: the revision of a model on the hub.
        trust_remote_code: run code that comes with the model.

    Returns:
        ``model`` with totals; ``selected_share`` of all parameters, ``rest`` (the largest groups of unselected
        parameters) and ``warning`` if the share is small (`converters.coverage`); and ``layers``. Each layer has its
        name, shape, parameters, whether it is selected and, if it is factored, its rank and ``down_of`` (the layer
        that owns its shared ``down``, and counts it). A selected layer also has its input group, its stable rank
        ‖W‖_F²/‖W‖₂², and the number of singular values that hold 99% of ‖W‖_F².

    Raises:
        InputError: there is no such model, or a pattern matches nothing.
    """
    quiet_libraries()
    folder = Path(path) / "artifact" if (Path(path) / "artifact").is_dir() else Path(path)
    config = load_config(str(folder), revision=revision, trust_remote_code=trust_remote_code)
    task = task_of(config)
    if compression(config) is not None:
        model = from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    else:
        model = load_model(str(folder), task, revision=revision, trust_remote_code=trust_remote_code)
    ranks = ranks_of(model)
    factored = low_rank_layers(model)
    targets = {} if factored else select_layers(model, include, exclude)
    groups = shared_inputs(model, task, _example(model, task), targets or factored)
    down_of = {name: first for first, *others in shared_groups(model) for name in others}
    layers = [_low_rank_facts(name, layer, groups[name], down_of.get(name)) for name, layer in factored.items()]
    factor_names = {f"{name}.{side}" for name in ranks for side in ("down", "up")}
    for name, module in model.named_modules():
        if isinstance(module, DenseLinear) and name not in factor_names:
            layers.append(_dense_facts(name, dense_weight(module), name in targets, groups.get(name)))
    selection = coverage(model, targets or factored)
    return {
        "model": Path(path).name if Path(path).exists() else path,
        "architecture": type(model).__name__,
        "task": task.name,
        "parameters": selection.total,
        **{key: value for key, value in selection.facts().items() if key != "total_parameters"},
        "warning": selection.warning,
        "layers_factored": len(ranks),
        "input_groups": len(set(groups.values())),
        "layers": layers,
    }


def _example(model: PreTrainedModel, task: Task) -> Batch:
    if task.name == "image-classification":
        # A model whose config has no image size accepts any.
        return image_inputs(model, image_size(model.config) or USUAL_IMAGE_SIZE).tensors
    return text_inputs(model, None).tensors


def _low_rank_facts(name: str, layer: LowRankLinear, group: str, down_of: str | None) -> dict[str, Any]:
    m, n, r = layer.out_features, layer.in_features, layer.rank
    parameters = r * (m if down_of else m + n)
    # The product of the factors' triangular parts has the same singular values as the product of the factors.
    left = torch.linalg.qr(layer.up.weight.detach().double()).R
    right = torch.linalg.qr(layer.down.weight.detach().double().T).R
    return {
        "name": name,
        "shape": [m, n],
        "rank": r,
        "down_of": down_of,
        "parameters": parameters,
        "share_kept": parameters / (m * n),
        "selected": True,
    } | _spectrum_facts(left @ right.T, group)


def _dense_facts(name: str, weight: torch.Tensor, selected: bool, group: str | None) -> dict[str, Any]:
    m, n = weight.shape
    facts = {"name": name, "shape": [m, n], "rank": None, "parameters": m * n, "share_kept": 1.0, "selected": selected}
    if not selected or group is None:
        return facts
    return facts | {"break_even_rank": break_even(m, n)} | _spectrum_facts(weight.detach().double(), group)


def _spectrum_facts(matrix: torch.Tensor, group: str) -> dict[str, Any]:
    energy = torch.linalg.svdvals(matrix).square()
    cumulative = energy.cumsum(0) / energy.sum().clamp_min(1e-300)
    return {
        "input_group": group,
        "stable_rank": float(energy.sum() / energy[0].clamp_min(1e-300)),
        "rank_of_99_percent": int((cumulative < ENERGY).sum()) + 1,
    }
