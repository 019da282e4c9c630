"""Open a graph with ONNX Runtime, with a fixed number of threads."""

from pathlib import Path

import onnxruntime

from converters.errors import InputError

CPU = "CPUExecutionProvider"


def open_session(
    path: Path, threads: int = 1, provider: str = CPU, profile: Path | None = None, exact_int8: bool = True
) -> onnxruntime.InferenceSession:
    """Open a session on one execution provider, with `session_options`.

    Args:
        exact_int8: as for `session_options`.
        profile: the beginning of the name of a file to which the time of every kernel is written.

    Raises:
        InputError: the file does not exist, or ``threads`` is below 1.
        RuntimeError: the provider did not start; ONNX Runtime would continue without it.
    """
    if not path.is_file():
        raise InputError(f"no ONNX graph at {path}")
    options = session_options(threads, exact_int8)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    if provider not in session.get_providers():
        raise RuntimeError(f"{provider} did not start; ONNX Runtime has fallen back to {session.get_providers()[0]}")
    return session


def session_options(threads: int, exact_int8: bool = True) -> onnxruntime.SessionOptions:
    """Return options for ``threads`` threads inside an operator; operators run one after another.

    Args:
        exact_int8: on x86 without VNNI, sums of two products of 8 bits saturate at 16 bits unless weights are made
            unsigned, which is done here. It rewrites the graph, so it has no effect on an ``.ort`` file.

    Raises:
        InputError: ``threads`` is below 1.
    """
    if threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads  # by default, ONNX Runtime counts the machine's cores, not this process's
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Threads spin during a run, as by default, but sleep once it returns. Otherwise they would spin on for 50 ms to a
    # second, and take the cores from whatever runs next, such as the other model of a measurement.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.x64quantprecision", str(int(exact_int8)))
    options.log_severity_level = 3  # errors only; warnings are about the machine, not the graph
    return options
