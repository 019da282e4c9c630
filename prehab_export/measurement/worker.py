"""One model in one fresh process, measured: ``python -m prehab_export.measurement.worker``.

Speaks JSON, one question per line on stdin and one answer per line on stdout, until stdin closes:

- ``load``: open the session and serve one request; answers ``load_s`` and ``first_ms``. With
  ``sample_memory`` true, also serve two more and answer the memory figures (see `memory_figures`).
- ``turn``: serve requests for ``min_seconds``, at least ``min_runs``; answers their times.
- ``profile``: serve ``runs`` requests in a session of its own that notes every kernel; answers, for each phase of a
  request, how often each operator ran and what it took.

What fails is answered with ``{"error": …}``. Only onnxruntime and numpy are imported, never torch: they are the runtime
that a user deploys, and anything else would be counted as the model's memory.

A "request" is one run of the graph, or, for a decoder with a cache, a prefill and the decode steps after it.
Values stay in OrtValues from one step to the next, so that handing the cache on copies nothing in Python; the
next token is drawn beforehand, so that both models walk the same path and no sampling is timed.
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
    """Milliseconds: whole requests, first tokens (equal where nothing is decoded), single decode steps."""

    total_ms: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)


def serve(request: PreparedRequest, times: Times) -> None:
    """One request, its times appended."""
    start = time.perf_counter()
    values = request.session.run_with_ort_values(request.outputs, request.prefill)
    before = time.perf_counter()
    times.first_token_ms.append((before - start) * 1e3)
    for feeds in request.steps:
        cache = {name: values[index] for name, index in request.cache.items()}
        values = request.session.run_with_ort_values(request.outputs, feeds | cache)
        after = time.perf_counter()
        times.step_ms.append((after - before) * 1e3)
        before = after
    times.total_ms.append((before - start) * 1e3)


def turn(request: PreparedRequest, min_runs: int, min_seconds: float) -> Times:
    """Requests for a while. One run goes unrecorded: it warms caches that the other model has just used."""
    request.session.run_with_ort_values(request.outputs, request.prefill)
    times, end = Times(), time.perf_counter() + min_seconds
    while len(times.total_ms) < min_runs or time.perf_counter() < end:
        serve(request, times)
    return times


def load(question: dict[str, Any]) -> tuple[PreparedRequest, dict[str, Any]]:
    runtime = resident_kb()
    if not question["sample_memory"]:
        return _open_and_serve(question)
    with sampled_memory() as peaks:
        request, answer = _open_and_serve(question)
        turn(request, min_runs=2, min_seconds=0)  # ORT plans its memory on the first run, and uses it from the second
    return request, answer | memory_figures(runtime, peaks)


def _open_and_serve(question: dict[str, Any]) -> tuple[PreparedRequest, dict[str, Any]]:
    case = Case(**question["case"])
    start = time.perf_counter()
    session = open_session(Path(question["model"]), case.threads, question["provider"])
    load_s = time.perf_counter() - start
    request, times = prepare_request(session, case), Times()
    try:
        serve(request, times)
    except Exception as error:
        reason = "; a sequence (with its new tokens) may be longer than the model's table of positions"
        raise RuntimeError(f"the graph fails at these sizes{reason if case.sequence else ''}: {error}") from error
    return request, {"load_s": load_s, "first_ms": times.first_token_ms[0]}


def profile(question: dict[str, Any]) -> dict[str, Any]:
    """Kernel times by operator. Noting them slows small kernels down, so they are for shares, not for totals."""
    with tempfile.TemporaryDirectory() as folder:
        case = Case(**question["case"])
        model, notes = Path(question["model"]), Path(folder) / "profile"
        session = open_session(model, case.threads, question["provider"], profile=notes)
        request, times = prepare_request(session, case), Times()
        for _ in range(1 + question["runs"]):  # the first plans the memory
            serve(request, times)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return {"phases": kernel_times(events, len(request.steps))}


def main() -> None:
    # Answers go out on a descriptor of their own: a library that prints to stdout must not garble them.
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
                assert request is not None, "turn asked for before load"
                answer = vars(turn(request, question["min_runs"], question["min_seconds"]))
        except Exception as error:  # ORT's exceptions share no base class; the parent gives the context
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
