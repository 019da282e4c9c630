"""Opening a graph with ONNX Runtime, threads stated."""

from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from converters.errors import InputError


def open_session(
    path: Path, threads: int = 1, providers: Sequence[str] = ("CPUExecutionProvider",)
) -> onnxruntime.InferenceSession:
    """A session with ``threads`` threads inside an operator and operators one after the other.

    ONNX Runtime by itself takes a thread per core of the machine, not of the process's affinity.

    Raises:
        InputError: the file is not there, or threads is below 1.
    """
    if not path.is_file():
        raise InputError(f"no ONNX graph at {path}")
    return onnxruntime.InferenceSession(str(path), session_options(threads), providers=list(providers))


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Raises:
    InputError: threads is below 1.
    """
    if threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only; the rest is about the machine, not the graph
    return options
