"""One model in one fresh process, measured: ``python -m prehab_export.measurement.worker``.

Speaks JSON, one request per line on stdin and one answer per line on stdout, until stdin closes:

- ``load``: open the session and serve one request; answers ``load_s`` and ``first_ms``. With
  ``sample_memory`` true, also serve two more and answer the memory figures (see `_memory_answer`).
- ``turn``: serve requests for ``min_seconds``, at least ``min_runs``; answers their times.
- ``profile``: serve ``runs`` requests in a session of its own that notes every kernel; answers, for each phase of a
  request, how often each operator ran and what it took.

A request that fails is answered with ``{"error": …}``. Only onnxruntime and numpy are imported, never torch:
they are the runtime that a user deploys, and anything else would be counted as the model's memory.

A "request" is one run of the graph, or, for a decoder with a cache, a prefill and the decode steps after it.
Values stay in OrtValues from one step to the next, so that handing the cache on copies nothing in Python; the
next token is drawn beforehand, so that both models walk the same path and no sampling is timed.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from converters.number_formats import ARRAY_FORMATS
from prehab_export.measurement.kernel_cost import of_event

SAMPLE_EVERY_S = 0.002
SEED = 0
STATUS = Path("/proc/self/status")

Feeds = dict[str, ort.OrtValue]


@dataclass(frozen=True)
class Case:
    """Threads; sizes of a request: items in the batch, tokens in the prompt, tokens to generate, ids to draw from; ids
    that a text ends with."""

    threads: int
    batch: int
    sequence: int | None
    new_tokens: int
    vocab_size: int | None
    end_tokens: Sequence[int] = ()


@dataclass(frozen=True)
class Plan:
    """A session and everything that it is fed, made before the clock starts."""

    session: ort.InferenceSession
    outputs: list[str]
    prefill: Feeds
    steps: list[Feeds]
    cache: dict[str, int]  # past input → index of the output that replaces it


@dataclass
class Times:
    """Milliseconds: whole requests, first tokens (equal where nothing is decoded), single decode steps."""

    total_ms: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)


def open_session(model: str, options: ort.SessionOptions, provider: str) -> ort.InferenceSession:
    """Raises:
    RuntimeError: the provider did not start; ONNX Runtime would go on without it.
    """
    session = ort.InferenceSession(model, options, providers=[provider])
    if provider not in session.get_providers():
        raise RuntimeError(f"{provider} did not start; ONNX Runtime has fallen back to {session.get_providers()[0]}")
    return session


def session_options(threads: int) -> ort.SessionOptions:
    ort.set_default_logger_severity(3)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads  # unset, ORT counts the machine's cores, not this process's
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Threads spin inside a run, as by default, but sleep once it returns: left spinning (50 ms to a second)
    # they would take the cores from the other model, whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def make_plan(session: ort.InferenceSession, case: Case) -> Plan:
    """Inputs from the graph's own metadata.

    Raises:
        ValueError: the graph fixes a size otherwise, or takes an input that nothing is known about.
    """
    rng = np.random.default_rng(SEED)
    outputs = [output.name for output in session.get_outputs()]
    past = [node for node in session.get_inputs() if node.name.startswith("past_key_values.")]
    plain = [node for node in session.get_inputs() if not node.name.startswith("past_key_values.")]
    sequence = case.sequence or 0
    prefill = {node.name: _values(node, case, 0, sequence, rng) for node in plain}
    prefill |= {node.name: _empty_cache(node, case.batch) for node in past}
    steps = range(sequence, sequence + case.new_tokens - 1) if past else ()
    return Plan(
        session=session,
        outputs=outputs,
        prefill=_ort_values(prefill),
        steps=[_ort_values({n.name: _values(n, case, length, 1, rng) for n in plain}) for length in steps],
        cache={node.name: _present(node.name, outputs) for node in past},
    )


def _values(node: Any, case: Case, past: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """One input (not the cache) for ``length`` new tokens after ``past`` old ones."""
    dtype = _numpy_type(node)
    if node.name == "input_ids":
        if case.vocab_size is None:
            raise ValueError("no size of the vocabulary was given for input_ids")
        ids = rng.integers(0, case.vocab_size, _shape(node, (case.batch, length)), dtype=dtype)
        return _ended(ids, case.vocab_size, case.end_tokens)
    if node.name in ("position_ids", "cache_position"):
        wanted = (case.batch, length) if len(node.shape) == 2 else (length,)
        return np.broadcast_to(np.arange(past, past + length, dtype=dtype), _shape(node, wanted)).copy()
    if node.name == "token_type_ids":
        return np.zeros(_shape(node, (case.batch, length)), dtype)
    if node.name == "attention_mask":
        return np.ones(_shape(node, (case.batch, past + length)), dtype)
    if np.issubdtype(dtype, np.floating):  # pixel_values and the like: only the batch may be free
        return rng.standard_normal(_shape(node, (case.batch, *node.shape[1:]))).astype(dtype)
    raise ValueError(f"the graph takes an input {node.name} ({node.type}) that the bench cannot make up")


def _ended(ids: np.ndarray, vocab_size: int, ends: Sequence[int]) -> np.ndarray:
    """The ids with these at the end of each row and nowhere else, where they have the room."""
    others = np.setdiff1d(np.arange(vocab_size, dtype=ids.dtype), ends)
    if not ends or len(ends) >= ids.shape[1] or not len(others):
        return ids
    ids = np.where(np.isin(ids, ends), others[ids % len(others)], ids)
    ids[:, -len(ends) :] = ends
    return ids


def _empty_cache(node: Any, batch: int) -> np.ndarray:
    """(batch, …) with length 0 at the one free dimension."""
    free = [i for i, size in enumerate(node.shape) if i > 0 and not isinstance(size, int)]
    if len(free) != 1:
        raise ValueError(f"the cache input {node.name} {node.shape} needs exactly one free length")
    return np.zeros(
        _shape(node, (batch, *(0 if i in free else size for i, size in enumerate(node.shape) if i))),
        _numpy_type(node),
    )


def _shape(node: Any, wanted: tuple[Any, ...]) -> tuple[int, ...]:
    """``wanted``, once it is seen to fit the shape that the graph declares."""
    if not all(isinstance(size, int) for size in wanted):
        raise ValueError(f"the graph leaves sizes of {node.name} {node.shape} free; export it with fixed sizes")
    fits = len(wanted) == len(node.shape) and all(
        not isinstance(declared, int) or declared == size for size, declared in zip(wanted, node.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"the graph declares {node.name} as {node.shape}, but {list(wanted)} was asked for")
    return wanted


def _numpy_type(node: Any) -> np.dtype[Any]:
    if node.type not in ARRAY_FORMATS:
        raise ValueError(f"the graph's input {node.name} is a {node.type}, which the bench cannot make up")
    return np.dtype(ARRAY_FORMATS[node.type])


def _present(past: str, outputs: list[str]) -> int:
    name = past.replace("past_key_values.", "present.", 1)
    if name not in outputs:
        raise ValueError(f"the graph takes {past} but has no output {name} to feed it from")
    return outputs.index(name)


def _ort_values(arrays: dict[str, np.ndarray]) -> Feeds:
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}


def serve(plan: Plan, times: Times) -> None:
    """One request, its times appended."""
    start = time.perf_counter()
    values = plan.session.run_with_ort_values(plan.outputs, plan.prefill)
    before = time.perf_counter()
    times.first_token_ms.append((before - start) * 1e3)
    for feeds in plan.steps:
        cache = {name: values[index] for name, index in plan.cache.items()}
        values = plan.session.run_with_ort_values(plan.outputs, feeds | cache)
        after = time.perf_counter()
        times.step_ms.append((after - before) * 1e3)
        before = after
    times.total_ms.append((before - start) * 1e3)


def turn(plan: Plan, min_runs: int, min_seconds: float) -> Times:
    """Requests for a while. One run goes unrecorded: it warms caches that the other model has just used."""
    plan.session.run_with_ort_values(plan.outputs, plan.prefill)
    times, end = Times(), time.perf_counter() + min_seconds
    while len(times.total_ms) < min_runs or time.perf_counter() < end:
        serve(plan, times)
    return times


def resident_kb() -> dict[str, int]:
    """This process's memory in kB by kind (anonymous, file, peak); empty on systems without /proc."""
    try:
        lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
        kb = {key: int(lines[key].split()[0]) for key in ("VmHWM", "RssAnon", "RssFile", "RssShmem")}
    except (OSError, KeyError):
        return {}
    return {"anonymous": kb["RssAnon"] + kb["RssShmem"], "file": kb["RssFile"], "peak": kb["VmHWM"]}


@contextmanager
def sampled_memory() -> Iterator[dict[str, int]]:
    """The highest of each kind of memory while the block runs; the kernel keeps a peak of the sum only."""
    peaks: dict[str, int] = {}
    done = threading.Event()

    def sample() -> None:
        finished = False
        while not finished:
            finished = done.wait(SAMPLE_EVERY_S)  # and sample once more after the end
            for kind, kb in resident_kb().items():
                peaks[kind] = max(peaks.get(kind, 0), kb)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peaks
    finally:
        done.set()
        sampler.join()


def _memory_answer(runtime: dict[str, int], peaks: dict[str, int]) -> dict[str, float | None]:
    """MB (10⁶ bytes). ``runtime_*``: Python and ONNX Runtime before a model; the peaks include it."""
    resident = peaks.get("peak", _rusage_peak_kb())
    kb = {
        "peak_resident_mb": resident,
        "peak_anonymous_mb": peaks.get("anonymous"),
        "mapped_file_mb": peaks.get("file"),
        "runtime_resident_mb": runtime["anonymous"] + runtime["file"] if runtime else None,
        "runtime_anonymous_mb": runtime.get("anonymous"),
        "runtime_file_mb": runtime.get("file"),
    }
    return {key: None if value is None else value * 1024 / 1e6 for key, value in kb.items()}


def _rusage_peak_kb() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "darwin" else peak


def load(request: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
    runtime, case = resident_kb(), Case(**request["case"])
    if not request["sample_memory"]:
        return _open_and_serve(request["model"], request["provider"], case)
    with sampled_memory() as peaks:
        plan, answer = _open_and_serve(request["model"], request["provider"], case)
        turn(plan, min_runs=2, min_seconds=0)  # ORT plans its memory on the first run, and uses it from the second
    return plan, answer | _memory_answer(runtime, peaks)


def _open_and_serve(model: str, provider: str, case: Case) -> tuple[Plan, dict[str, Any]]:
    start = time.perf_counter()
    session = open_session(model, session_options(case.threads), provider)
    load_s = time.perf_counter() - start
    plan, times = make_plan(session, case), Times()
    try:
        serve(plan, times)
    except Exception as error:
        reason = "; a sequence (with its new tokens) may be longer than the model's table of positions"
        raise RuntimeError(f"the graph fails at these sizes{reason if case.sequence else ''}: {error}") from error
    return plan, {"load_s": load_s, "first_ms": times.first_token_ms[0]}


def profile(request: dict[str, Any]) -> dict[str, Any]:
    """Kernel times by operator. Noting them slows small kernels down, so they are for shares, not for totals."""
    with tempfile.TemporaryDirectory() as folder:
        case = Case(**request["case"])
        options = session_options(case.threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = open_session(request["model"], options, request["provider"])
        plan = make_plan(session, case)
        times = Times()
        for _ in range(1 + request["runs"]):  # the first plans the memory
            serve(plan, times)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return {"phases": kernel_times(events, len(plan.steps))}


def kernel_times(events: list[dict[str, Any]], steps: int) -> dict[str, list[dict[str, Any]]]:
    """Phase → operators by falling time: ``op``, its ``count``, median milliseconds ``ms`` and ``gflop`` in one run.

    Args:
        events: as ONNX Runtime's profiler writes them.
        steps: runs of the session after the first one of each request.
    """
    runs = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("name") == "model_run")
    kernels = sorted(
        (event["ts"], event["args"]["op_name"], event["dur"], of_event(event["args"]))
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )
    by_phase: dict[str, list[dict[str, list[tuple[float, int]]]]] = {}
    at = 0
    for number, (start, end) in enumerate(runs):
        own: dict[str, list[tuple[float, int]]] = {}
        while at < len(kernels) and kernels[at][0] <= end:
            when, op, took, products = kernels[at]
            if when >= start:
                own.setdefault(op, []).append((took / 1e3, products))
            at += 1
        if number > steps:  # all but the first request
            phase = "request" if not steps else "next_token" if number % (steps + 1) else "first_token"
            by_phase.setdefault(phase, []).append(own)
    return {phase: _medians(of_runs) for phase, of_runs in by_phase.items()}


def _medians(runs: list[dict[str, list[tuple[float, int]]]]) -> list[dict[str, Any]]:
    ops = {op for run in runs for op in run}
    rows = [
        {
            "op": op,
            "count": int(np.median([len(run.get(op, ())) for run in runs])),
            "ms": float(np.median([sum(ms for ms, _ in run.get(op, ())) for run in runs])),
            "gflop": 2e-9 * float(np.median([sum(products for _, products in run.get(op, ())) for run in runs])),
        }
        for op in ops
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def main() -> None:
    # Answers go out on a descriptor of their own: a library that prints to stdout must not garble them.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    plan: Plan | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["action"] == "load":
                plan, answer = load(request)
            elif request["action"] == "profile":
                answer = profile(request)
            else:
                assert plan is not None, "turn asked for before load"
                answer = vars(turn(plan, request["min_runs"], request["min_seconds"]))
        except Exception as error:  # ORT's exceptions share no base class; the parent gives the context
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
