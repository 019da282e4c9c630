"""Name the contents of a graph: weights keep their names in the model, everything else is numbered.

A weight has its ``state_dict`` name. ONNX multiplies weights from the right (x @ W), so the weight of an ``nn.Linear``
is stored transposed, and its name then ends in ``.T``: ``…query.down.weight.T`` is in×rank. The name of a weight that
is multiplied head by head ends in ``.heads`` (heads×width×rank) or, transposed per head, in ``.heads.T``. A weight with
several names, such as a shared ``down``, has the first. Constants that the exporter or a fusion created are called
``constant_{i}``. The name of stacked weights consists of the parts that their names share, with the different parts in
braces: ``…attention.{query,key,value}.down.weight.T``.
"""

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from converters.onnx.stored import stored_tensor

TRANSPOSED = ".T"
HEADS = ".heads"


def restore_weight_names(graph: ir.Graph, prefix: str, first_names: Mapping[str, str]) -> None:
    """Remove the wrapper's prefix from the names of initialisers, and use the first of a weight's names."""
    for value in list(graph.initializers.values()):
        assert value.name is not None
        if value.name.startswith(prefix):
            name = value.name.removeprefix(prefix)
            _rename_initializer(graph, value, first_names.get(name, name))


def store_transposed(model: ir.Model) -> None:
    """Replace ``Transpose(weight)`` by a weight that is stored transposed, so that it keeps a readable name.

    A weight that is also read without a transpose (an embedding tied to the output layer) keeps its ``Transpose``: two
    copies would take twice the space on disk.
    """
    graph = model.graph
    for source in list(graph.initializers.values()):
        readers = [node for node, _ in source.uses()]
        if not readers or not all(_swaps_axes(node) for node in readers):
            continue
        tensor = source.const_value
        assert isinstance(tensor, ir.Tensor)
        assert isinstance(tensor.raw, torch.Tensor)
        value = _register(graph, f"{source.name}{TRANSPOSED}", tensor.raw.detach().T, tensor)
        for node in readers:
            node.outputs[0].replace_all_uses_with(value)
    RemoveUnusedNodesPass()(model)


def store_by_head(model: ir.Model) -> None:
    """Replace a ``Reshape(weight)`` from two axes to three, and a ``Transpose`` of the last two axes if one follows, by
    a weight that is stored in that form."""
    graph = model.graph
    for source in list(graph.initializers.values()):
        for node in [node for node, _ in source.uses() if node.op_type == "Reshape"]:
            shape = node.outputs[0].shape
            if len(source.shape or ()) != 2 or shape is None or len(shape) != 3 or not shape.is_static():
                continue
            tensor = source.const_value
            assert isinstance(tensor, ir.Tensor)
            assert isinstance(tensor.raw, torch.Tensor)
            by_head = tensor.raw.detach().reshape(shape.numpy())
            readers = [reader for reader, _ in node.outputs[0].uses()]
            if readers and all(_swaps_axes(reader, [0, 2, 1]) for reader in readers):
                value = _register(graph, f"{source.name}{HEADS}{TRANSPOSED}", by_head.transpose(1, 2), tensor)
                for reader in readers:
                    reader.outputs[0].replace_all_uses_with(value)
            else:
                node.outputs[0].replace_all_uses_with(_register(graph, f"{source.name}{HEADS}", by_head, tensor))
    RemoveUnusedNodesPass()(model)


def _swaps_axes(node: ir.Node, order: Sequence[int] = (1, 0)) -> bool:
    """Whether a node is a transpose with this order of axes."""
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == list(order)


def _register(graph: ir.Graph, name: str, view: torch.Tensor, original: ir.Tensor) -> ir.Value:
    """Add an initialiser to the graph that is a view of another one's values, and only copied when it is written."""
    stored = stored_tensor(view, original, name)
    value = ir.Value(name=name, shape=stored.shape, type=ir.TensorType(stored.dtype), const_value=stored)
    graph.register_initializer(value)
    return value


def tidy(model: ir.Model, weights: Collection[str]) -> None:
    """Number nodes and values in graph order, and remove the exporter's leftovers (stack traces, paths, stale shapes),
    so that equal weights give equal files. ``weights`` are the names to keep."""
    ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    graph = model.graph
    graph.name = "model"
    interface = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for index, node in enumerate(graph.all_nodes()):
        node.name = f"{node.op_type}_{index}"
        for position, value in enumerate(node.outputs):
            if id(value) not in interface:
                # ONNX Runtime counts the outputs of a Split by their names.
                needs_name = value.uses() or node.op_type == "Split"
                value.name = f"value_{index}_{position}" if needs_name else ""
                value.shape = None  # onnxruntime's quantiser rejects a graph with any shape that a rewrite left stale
    parameters = {parameter_name(name) for name in weights}
    constants = [name for name in graph.initializers if parameter_name(name) not in parameters]
    for index, name in enumerate(constants):
        _rename_initializer(graph, graph.initializers[name], f"constant_{index}")


def parameter_name(name: str) -> str:
    """Remove the suffixes of an initialiser's name that say how the parameter is stored.

    >>> parameter_name("layer.0.value.up.weight.heads.T")
    'layer.0.value.up.weight'
    """
    return name.removesuffix(TRANSPOSED).removesuffix(HEADS)


def _rename_initializer(graph: ir.Graph, value: ir.Value, name: str) -> None:
    assert value.name is not None
    del graph.initializers[value.name]
    value.name = name
    if value.const_value is not None:
        value.const_value.name = name
    graph.initializers[name] = value
