"""Read the facts about an ONNX file that the bench needs before it runs it: inputs, vocabulary, size."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from converters.errors import InputError

# Operators that change the type or shape of token ids or of a table, but not the meaning.
_CARRY = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "DequantizeLinear"}
# Operator that looks up embeddings → the indices of the inputs with the table, and with the table's steps.
_LOOKUP = {"Gather": (0,), "GatherBlockQuantized": (0, 2), "EmbedLayerNormalization": (2,)}


@dataclass(frozen=True)
class GraphFacts:
    """Facts about one graph.

    takes_tokens: whether it has ``input_ids``.
    decodes: whether it has a cache.
    vocab_size: rows of the embedding table; None if no table is indexed by ``input_ids``.
    file_bytes: size on disk, including external data.
    weight_bytes: size of all weights except embedding tables, since a request only reads some of their rows.
    """

    path: Path
    takes_tokens: bool
    decodes: bool
    vocab_size: int | None
    file_bytes: int
    weight_bytes: int


def read_graph(path: Path) -> GraphFacts:
    """Read the facts from a graph's structure; for a folder, those of the ``model.onnx`` in it.

    Raises:
        InputError: no such file, not an ONNX file, or an external data file is missing.
    """
    path = path / "model.onnx" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"there is no ONNX file {path}")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX file: {error}") from error
    if not model.graph.input or not model.graph.output:
        raise InputError(f"{path} is not an ONNX model: its graph has no inputs or no outputs")
    names = [value.name for value in model.graph.input]
    return GraphFacts(
        path=path,
        takes_tokens="input_ids" in names,
        decodes=any(name.startswith("past_key_values.") for name in names),
        vocab_size=_vocab_size(model.graph),
        weight_bytes=_weight_bytes(model.graph),
        file_bytes=path.stat().st_size + sum(_file_size(path, name) for name in external_files(model)),
    )


def external_files(model: onnx.ModelProto) -> set[str]:
    """Return the names of the files with external weights, relative to the model's folder."""
    return {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _file_size(path: Path, name: str) -> int:
    try:
        return (path.parent / name).stat().st_size
    except OSError as error:
        raise InputError(f"{path} keeps weights in {name}, which is not beside it") from error


def _weight_bytes(graph: onnx.GraphProto) -> int:
    """The size of all weights. A table only counts if another operator reads it too, such as a tied output layer."""
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type in _CARRY}
    read_names = {
        _origin(name, sources)
        for node in graph.node
        if node.op_type not in _CARRY
        for index, name in enumerate(node.input)
        if index not in _LOOKUP.get(node.op_type, ())
    }
    return sum(_tensor_bytes(tensor) for tensor in graph.initializer if tensor.name in read_names)


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    return math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth / 8)


def _vocab_size(graph: onnx.GraphProto) -> int | None:
    """The smallest number of rows among the tables that ``input_ids`` are looked up in."""
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type in _CARRY}
    # A Gather on a table's row numbers only rejects ids beyond the table (see `converters.onnx.blocks`); its output is
    # the ids themselves.
    row_numbers = {node.output[0] for node in graph.node if node.op_type == "Range"}
    sources |= {
        node.output[0]: node.input[1]
        for node in graph.node
        if node.op_type == "Gather" and node.input[0] in row_numbers
    }
    sizes = [rows[table] for table in (_origin(t, sources) for t in _tables(graph, sources)) if table in rows]
    return min(sizes, default=None)


def _tables(graph: onnx.GraphProto, sources: dict[str, str]) -> Iterator[str]:
    """The names of the tables that ``input_ids`` are looked up in."""
    for node in graph.node:
        if node.op_type not in _LOOKUP or any(a.name in ("axis", "gather_axis") and a.i for a in node.attribute):
            continue
        ids = node.input[0 if node.op_type == "EmbedLayerNormalization" else 1]
        if _origin(ids, sources) == "input_ids":
            yield node.input[_LOOKUP[node.op_type][0]]


def _origin(name: str, sources: dict[str, str]) -> str:
    """Follow a value back through the operators that only pass it on."""
    while name in sources:
        name = sources[name]
    return name
