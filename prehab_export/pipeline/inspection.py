"""A look at a model or an artifact: its layers, what they share, how compressible they are, what would be done."""

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

ENERGY = 0.99


def inspect_model(
    path: str,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Facts of a dense model, a compressed folder, or the folder of a run (its artifact).

    Returns:
        ``model`` with totals; ``selected_share`` of all parameters, ``rest`` (the largest groups of the others) and
        ``warning`` where that share is small (`converters.coverage`); and ``layers``: name, shape, rank (two-factor
        layers), ``down_of`` (the layer whose ``down`` it holds, and which counts it), parameters, whether it is
        selected; of those that are, the input group, the stable rank ‖W‖_F²/‖W‖₂², and how many singular values hold
        99% of ‖W‖_F².

    Raises:
        InputError: no such model, or a pattern that matches nothing.
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
    covered = coverage(model, targets or factored)
    return {
        "model": Path(path).name if Path(path).exists() else path,
        "architecture": type(model).__name__,
        "task": task.name,
        "parameters": covered.total,
        **{key: value for key, value in covered.facts().items() if key != "total_parameters"},
        "warning": covered.warning,
        "layers_factored": len(ranks),
        "input_groups": len(set(groups.values())),
        "layers": layers,
    }


def _example(model: PreTrainedModel, task: Task) -> Batch:
    if task.name == "image-classification":
        # Models whose config names no size take any.
        return image_inputs(model, image_size(model.config) or USUAL_IMAGE_SIZE).tensors
    return text_inputs(model, None).tensors


def _low_rank_facts(name: str, layer: LowRankLinear, group: str, down_of: str | None) -> dict[str, Any]:
    m, n, r = layer.out_features, layer.in_features, layer.rank
    parameters = r * (m if down_of else m + n)
    # The product's singular values, from the small triangles of its two factors.
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
    within = energy.cumsum(0) / energy.sum().clamp_min(1e-300)
    return {
        "input_group": group,
        "stable_rank": float(energy.sum() / energy[0].clamp_min(1e-300)),
        "rank_of_99_percent": int((within < ENERGY).sum()) + 1,
    }
