"""A process that measures one model: ``python -m prehab_export.measurement.worker``.

It reads one JSON question per line on stdin and writes one JSON answer per line on stdout, until stdin closes:

- ``load`` opens the session and serves one request. It answers ``load_s`` and ``first_ms``. If ``sample_memory`` is
  true, it serves two more requests and also answers the memory figures (see `memory_figures`).
- ``turn`` serves requests for ``min_seconds``, and at least ``min_runs`` of them. It answers their times.
- ``profile`` serves ``runs`` requests in a separate session that profiles every kernel. It answers the count and time
  of each operator for each phase of a request.

The answer to a question that fails is ``{"error": …}``. The process imports onnxruntime and numpy, which a user deploys
too, and never torch, because its memory would count as the model's.

A "request" is one run of the graph, or, for a decoder with a cache, a prefill and the decode steps after it. Values
stay in OrtValues between steps, so that passing on the cache copies nothing in Python. The tokens are drawn beforehand,
so that all models process the same tokens and no sampling is timed.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort

from converters.onnx.runtime import open_session
from prehab_export.measurement.feeds import Case, PreparedRequest, prepare_request
from prehab_export.measurement.memory import memory_figures, resident_kb, sampled_memory
from prehab_export.measurement.operator_times import kernel_times


@dataclass
class Times:
    """Times in milliseconds: of requests, of first tokens (equal if the model does not decode), and of decode steps."""

    total_ms: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)


def serve(request: PreparedRequest, times: Times) -> None:
    """Serve one request and append its times."""
    start = time.perf_counter()
    values = request.session.run_with_ort_values(request.outputs, request.prefill)
    previous = time.perf_counter()
    times.first_token_ms.append((previous - start) * 1e3)
    for feeds in request.steps:
        cache = {name: values[index] for name, index in request.cache.items()}
        values = request.session.run_with_ort_values(request.outputs, feeds | cache)
        now = time.perf_counter()
        times.step_ms.append((now - previous) * 1e3)
        previous = now
    times.total_ms.append((previous - start) * 1e3)


def turn(request: PreparedRequest, min_runs: int, min_seconds: float) -> Times:
    """Serve requests for ``min_seconds``, and at least ``min_runs`` of them.

    The first run is not recorded: it refills the caches that the other models have just used.
    """
    request.session.run_with_ort_values(request.outputs, request.prefill)
    times, end = Times(), time.perf_counter() + min_seconds
    while len(times.total_ms) < min_runs or time.perf_counter() < end:
        serve(request, times)
    return times


def load(question: dict[str, Any]) -> tuple[PreparedRequest, dict[str, Any]]:
    """Open the model, and return a request for it and the answer to the question."""
    runtime_kb = resident_kb()
    if not question["sample_memory"]:
        return _open_and_serve(question)
    with sampled_memory() as peaks:
        request, answer = _open_and_serve(question)
        turn(
            request, min_runs=2, min_seconds=0
        )  # ONNX Runtime plans its memory in the first run and uses the plan from the second
    return request, answer | memory_figures(runtime_kb, peaks)


def _open_and_serve(question: dict[str, Any]) -> tuple[PreparedRequest, dict[str, Any]]:
    case = Case(**question["case"])
    start = time.perf_counter()
    session = open_session(Path(question["model"]), case.threads, question["provider"])
    load_s = time.perf_counter() - start
    request, times = prepare_request(session, case), Times()
    try:
        serve(request, times)
    except Exception as error:
        hint = "; the sequence and its new tokens may be longer than the model's table of positions"
        raise RuntimeError(f"the graph fails at these sizes{hint if case.sequence else ''}: {error}") from error
    return request, {"load_s": load_s, "first_ms": times.first_token_ms[0]}


def profile(question: dict[str, Any]) -> dict[str, Any]:
    """Return kernel times by operator.

    Profiling slows small kernels down, so the times are good for shares, not for totals.
    """
    with tempfile.TemporaryDirectory() as folder:
        case = Case(**question["case"])
        model, prefix = Path(question["model"]), Path(folder) / "profile"
        session = open_session(model, case.threads, question["provider"], profile=prefix)
        request, times = prepare_request(session, case), Times()
        for _ in range(1 + question["runs"]):  # ONNX Runtime plans its memory in the first request
            serve(request, times)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return {"phases": kernel_times(events, len(request.steps))}


def main() -> None:
    # Answers use a duplicate of stdout, and stdout itself becomes stderr: a library's output cannot corrupt them.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    ort.set_default_logger_severity(3)
    request: PreparedRequest | None = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if question["action"] == "load":
                request, answer = load(question)
            elif question["action"] == "profile":
                answer = profile(question)
            else:
                assert request is not None, "a turn needs a loaded model"
                answer = vars(turn(request, question["min_runs"], question["min_seconds"]))
        except Exception as error:  # ONNX Runtime's exceptions have no common base class; the parent adds the context
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
