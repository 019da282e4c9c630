"""Replace the values of a graph's weights, by their names in the model (see ``names``).

A graph whose shapes do not change need not be exported again: everything else in it is the same, including fusions.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import Tensor

from converters.onnx.names import HEADS, TRANSPOSED, parameter_name
from converters.onnx.write import has_external_data, publish_graph


def weight_names(source: Path) -> set[str]:
    """Return the names of the model's parameters that the graph contains, in stacks or alone."""
    return {part for name in ir.load(source).graph.initializers for part in _parts(name)}


def replace_weights(source: Path, target: Path, values: Mapping[str, Tensor]) -> Path:
    """Write ``source`` to ``target`` with these values by parameter name; returns ``target``, which only appears when
    it is complete. Parameters that are not named do not change.

    Raises:
        ValueError: a value has another shape than the weight, or only some parts of a stack are given.
    """
    model = ir.load(source)
    external = has_external_data(model)
    for value in model.graph.initializers.values():
        name, old = str(value.name), value.const_value
        parts = [part for part in _parts(name) if part in values]
        if not parts or old is None:
            continue
        if parts != _parts(name):
            raise ValueError(f"{name}: all parts of a stack must be given, not {', '.join(parts)} alone")
        arrays = [values[part].detach().cpu().numpy() for part in parts]
        if name.removesuffix(TRANSPOSED).endswith(HEADS):
            arrays = [array.reshape(old.shape.numpy()[0], -1, array.shape[-1]) for array in arrays]
        arrays = [np.swapaxes(array, -1, -2) for array in arrays] if name.endswith(TRANSPOSED) else arrays
        new = np.concatenate(arrays, axis=-1).astype(old.dtype.numpy())
        if new.shape != tuple(old.shape.numpy()):
            raise ValueError(f"{name}: {new.shape} cannot take the place of {tuple(old.shape.numpy())}")
        value.const_value = ir.tensor(new, name=name)
    publish_graph(model, target, 0 if external else None, check=False)
    return target


def _parts(name: str) -> list[str]:
    """The names of the parameters in an initialiser of this name.

    >>> _parts("layer.0.{query,key}.down.weight.T")
    ['layer.0.query.down.weight', 'layer.0.key.down.weight']
    """
    name = parameter_name(name)
    stack = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
    return [name] if stack is None else [f"{stack[1]}{part}{stack[3]}" for part in stack[2].split(",")]
