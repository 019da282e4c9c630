"""Opening a graph with ONNX Runtime, threads stated."""

from pathlib import Path

import onnxruntime

from converters.errors import InputError

CPU = "CPUExecutionProvider"


def open_session(
    path: Path, threads: int = 1, provider: str = CPU, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """A session on one execution provider, with `session_options`.

    Args:
        profile: where every kernel is to be noted: the beginning of a file's name.

    Raises:
        InputError: the file is not there, or threads is below 1.
        RuntimeError: the provider did not start; ONNX Runtime would go on without it.
    """
    if not path.is_file():
        raise InputError(f"no ONNX graph at {path}")
    options = session_options(threads)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    if provider not in session.get_providers():
        raise RuntimeError(f"{provider} did not start; ONNX Runtime has fallen back to {session.get_providers()[0]}")
    return session


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """``threads`` threads inside an operator, and operators one after the other.

    Raises:
        InputError: threads is below 1.
    """
    if threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads  # unset, ORT counts the machine's cores, not this process's
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Threads spin inside a run, as by default, but sleep once it returns: left spinning (50 ms to a second) they would
    # take the cores from whatever runs next, such as the other model of a measurement.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors only; the rest is about the machine, not the graph
    return options
