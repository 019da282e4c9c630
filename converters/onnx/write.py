"""Write an ONNX file tensor by tensor.

The Protocol Buffers library needs the whole message in memory, and twice: as an object and as bytes. But a message
consists of its fields one after another, each preceded by its length (Protocol Buffers encoding, "length-delimited
records"), and the lengths follow from the shapes. So everything except the weights is serialised as usual, and the
weights follow one at a time. Writing a model of S bytes then takes the memory of one tensor, not 2·S.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import ModelProto, TensorProto

from converters.onnx.modes import DATA_SUFFIX
from converters.publishing import published_files

# Field numbers of onnx.proto, with the wire type of length-delimited records.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = (field << 3 | 2 for field in (7, 5, 9))
# Smaller tensors are serialised with the message.
_LEAST_BYTES = 1024
# The most bytes of weights in memory while they are written to a file of their own, but for a single larger tensor.
_IN_FLIGHT = 128 * 2**20

# The default threshold, below the limit of 2 GiB for a protobuf file.
EXTERNAL_DATA_THRESHOLD = 1_900_000_000


def data_file(graph: Path) -> Path:
    """Return the path of a graph's weights if they are not in the graph, by the usual name."""
    return graph.with_name(f"{graph.name}{DATA_SUFFIX}")


def has_external_data(model: ir.Model) -> bool:
    """Whether a graph that was read from a file keeps its weights in another file."""
    return any(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values())


def publish_graph(model: ir.Model, path: Path, threshold: int | None = None, *, check: bool = True) -> int:
    """Write a graph beside its destination, check it and move it there; returns the number of bytes written.

    Args:
        threshold: if the weights have more bytes than this, they are written to ``data_file(path)``; by default
            ``EXTERNAL_DATA_THRESHOLD``.
        check: check that the graph is valid; unnecessary if it was derived from another graph file.

    Raises:
        onnx.checker.ValidationError: the graph is not valid.
    """
    threshold = EXTERNAL_DATA_THRESHOLD if threshold is None else threshold
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    with published_files(data_file(path), path) as folder:
        partial = folder / path.name
        if weights > threshold:
            ir.save(model, partial, external_data=data_file(path).name, max_in_flight_bytes=_IN_FLIGHT)
            if check:
                onnx.checker.check_model(str(partial))  # reads the graph, not its external data
        else:
            write_graph(model, partial, check=check)
        return sum(file.stat().st_size for file in folder.iterdir())


def write_graph(model: ir.Model, path: Path, *, check: bool = True) -> None:
    """Write the model as one ONNX file with its weights inside; ``check`` that the graph is valid.

    Raises:
        onnx.checker.ValidationError: the graph is not valid.
    """
    weights = [value for value in model.graph.initializers.values() if _is_large(value)]
    with _without(model.graph, weights):
        rest = ir.serde.serialize_model(model)
    if check:
        _check(rest, weights)
    graph = rest.graph.SerializeToString()
    rest.ClearField("graph")
    records = [(_record_head(value), value) for value in weights]
    length = len(graph) + sum(len(head) + _tensor(value).nbytes for head, value in records)
    with path.open("wb") as file:
        file.write(rest.SerializeToString())
        file.write(bytes([_MODEL_GRAPH]) + _varint(length))
        file.write(graph)
        for head, value in records:
            file.write(head)
            # A tensor that is contiguous in memory is written without a copy.
            file.write(np.ascontiguousarray(_tensor(value).numpy()).reshape(-1).view(np.uint8).data)


def _is_large(value: ir.Value) -> bool:
    """Whether an initialiser is written separately from the message."""
    tensor = value.const_value
    if tensor is None:
        return False
    # The message would only hold a reference to a tensor in another file.
    return tensor.nbytes >= _LEAST_BYTES or isinstance(tensor, ir.ExternalTensor)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


@contextmanager
def _without(graph: ir.Graph, weights: Sequence[ir.Value]) -> Iterator[None]:
    """Remove these initialisers from the graph within the block."""
    order = dict(graph.initializers)
    try:
        for value in weights:
            del graph.initializers[str(value.name)]
        yield
    finally:
        graph.initializers.clear()
        graph.initializers.update(order)


def _check(rest: ModelProto, weights: Sequence[ir.Value]) -> None:
    """Check the graph with inputs of the same type and shape in place of its weights."""
    inputs = [
        onnx.helper.make_tensor_value_info(str(value.name), int(_tensor(value).dtype), _tensor(value).shape.numpy())
        for value in weights
    ]
    count = len(rest.graph.input)
    rest.graph.input.extend(inputs)
    onnx.checker.check_model(rest)
    del rest.graph.input[count:]


def _record_head(value: ir.Value) -> bytes:
    """An initialiser's record in the graph, without the bytes of its weights."""
    tensor = _tensor(value)
    head = TensorProto(name=value.name, dims=tensor.shape.numpy(), data_type=int(tensor.dtype)).SerializeToString()
    head += bytes([_TENSOR_RAW_DATA]) + _varint(tensor.nbytes)
    return bytes([_GRAPH_INITIALIZER]) + _varint(len(head) + tensor.nbytes) + head


def _varint(number: int) -> bytes:
    """Encode a number with seven bits per byte, lowest first; the top bit says that more bytes follow.

    >>> _varint(300)
    b'\\xac\\x02'
    """
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])
