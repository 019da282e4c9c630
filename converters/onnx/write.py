"""An ONNX file written tensor by tensor.

Protocol buffers want a whole message in memory, twice over: once as an object, once as bytes. But a message is only its
fields one after another, each with its length in front (Protocol Buffers encoding, "length-delimited records"), and
lengths are known from shapes. So everything but the weights is serialised as usual, and the weights follow, one at a
time: a model of S bytes takes one tensor's worth of memory to write, not 2·S.
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
# Smaller tensors stay in the message.
_LEAST_BYTES = 1024

# A protobuf file ends at 2 GiB.
EXTERNAL_DATA_THRESHOLD = 1_900_000_000


def data_file(graph: Path) -> Path:
    """Where a graph's weights lie if they are not in it: the name that the ecosystem looks for."""
    return graph.with_name(f"{graph.name}{DATA_SUFFIX}")


def has_external_data(model: ir.Model) -> bool:
    """Whether a graph that was read keeps weights in a file of their own."""
    return any(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values())


def publish_graph(model: ir.Model, path: Path, threshold: int | None = None, *, check: bool = True) -> int:
    """Write beside the destination, check, move into place; returns the bytes written.

    Args:
        threshold: weights of more bytes go to ``data_file(path)``; by default ``EXTERNAL_DATA_THRESHOLD``.
        check: that it is a valid graph; one made from a graph that came from elsewhere is as valid as that.

    Raises:
        onnx.checker.ValidationError: it is not a valid graph.
    """
    threshold = EXTERNAL_DATA_THRESHOLD if threshold is None else threshold
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    with published_files(data_file(path), path) as folder:
        written = folder / path.name
        if weights > threshold:
            ir.save(model, written, external_data=data_file(path).name)
            if check:
                onnx.checker.check_model(str(written))  # reads the graph, not its data
        else:
            write_graph(model, written, check=check)
        return sum(file.stat().st_size for file in folder.iterdir())


def write_graph(model: ir.Model, path: Path, *, check: bool = True) -> None:
    """Write the model as one ONNX file with its weights inside; ``check``: that it is a valid graph.

    Raises:
        onnx.checker.ValidationError: it is not a valid graph.
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
            # Tensors that lie in memory as they are written are not copied.
            file.write(np.ascontiguousarray(_tensor(value).numpy()).reshape(-1).view(np.uint8).data)


def _is_large(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None:
        return False
    # What lies in another file must not be a mere reference to it here.
    return tensor.nbytes >= _LEAST_BYTES or isinstance(tensor, ir.ExternalTensor)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


@contextmanager
def _without(graph: ir.Graph, weights: Sequence[ir.Value]) -> Iterator[None]:
    order = dict(graph.initializers)
    try:
        for value in weights:
            del graph.initializers[str(value.name)]
        yield
    finally:
        graph.initializers.clear()
        graph.initializers.update(order)


def _check(rest: ModelProto, weights: Sequence[ir.Value]) -> None:
    """Check the graph with inputs of the same type and shape in the place of its weights."""
    inputs = [
        onnx.helper.make_tensor_value_info(str(value.name), int(_tensor(value).dtype), _tensor(value).shape.numpy())
        for value in weights
    ]
    count = len(rest.graph.input)
    rest.graph.input.extend(inputs)
    onnx.checker.check_model(rest)
    del rest.graph.input[count:]


def _record_head(value: ir.Value) -> bytes:
    """All of an initialiser's record in the graph but the bytes of its weights."""
    tensor = _tensor(value)
    head = TensorProto(name=value.name, dims=tensor.shape.numpy(), data_type=int(tensor.dtype)).SerializeToString()
    head += bytes([_TENSOR_RAW_DATA]) + _varint(tensor.nbytes)
    return bytes([_GRAPH_INITIALIZER]) + _varint(len(head) + tensor.nbytes) + head


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow.

    >>> _varint(300)
    b'\\xac\\x02'
    """
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])
