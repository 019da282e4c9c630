"""Measure ONNX models against each other on ONNX Runtime: latency, memory, size.

The first model is the baseline. What makes the figures comparable:

- Latency is taken in *rounds*. In each round every model has a turn of the same length, in an order that is
  reversed from round to round, so that drift of clocks and temperature falls on all alike. Each model lives in a
  worker process of its own: the one that waits is blocked on its stdin, with its threads asleep.
- Memory is taken first, in a fresh process per model and case that holds nothing else. This also finds out
  what cannot run before any time is spent on measuring.
- Speedups are ratios of medians; their interval comes from a bootstrap over rounds, because runs in one
  round share whatever else the machine was doing.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from pathlib import Path

from converters.errors import InputError
from converters.onnx.graph_facts import GraphFacts, read_graph
from prehab_export.config import PROVIDERS, BenchConfig, check_provider, check_whole_number
from prehab_export.measurement.figures import Row, Timings, case_row, compare_rows
from prehab_export.measurement.roofline import Ceilings, as_row, measure_ceilings, roofline_of
from prehab_export.measurement.worker_process import WorkerProcess
from prehab_export.system import Advance, Progress, machine_facts, silent, step

PROFILED_RUNS = 5

RUNTIME = {
    "runtime": "onnxruntime",
    "execution_mode": "sequential",
    "graph_optimization": "all",
    "inter_op_threads": 1,
    "spinning": "within a run",
}


def bench(
    models: Mapping[str, Path],
    config: BenchConfig,
    vocab_size: int | None = None,
    progress: Progress = silent,
) -> Row:
    """Measure every model in every case; returns JSON types under machine, config, ceilings, cases and comparison.

    Keys carry their units; MB are 10⁶ bytes; a figure that does not apply or cannot be known is None. For a
    decoder with a cache a "request" is a prefill and ``new_tokens`` tokens, and p50_ms … are of requests.
    ``operators`` are kernel times by phase of a request, operator by operator; ``bound_ms`` is what the machine's
    ``ceilings`` allow (see ``roofline``), of a decoder for one new token.
    In the comparison ``speedup`` and its kin are baseline over model (above 1 is faster), ``memory_ratio`` and
    ``size_ratio`` are model over baseline (below 1 is smaller). ``model_memory_ratio`` leaves out what Python
    and ONNX Runtime take before a model is loaded.

    Args:
        models: name → ONNX file (or a folder with ``model.onnx``); the first is the baseline.
        vocab_size: token ids are drawn below it; found from the embedding table when None.

    Raises:
        InputError: a model or the provider is missing, or a model does not run at a size asked for, or outgrew memory
            or time.
    """
    check_provider(config.provider)
    graphs = _read_graphs(models)
    vocab_size = _common_vocab_size(graphs, vocab_size)
    cases = _cases(config, graphs, vocab_size)
    thread_counts = list(dict.fromkeys(case["threads"] for case in cases))
    # Of each model in each case its memory, its turns, and its operators.
    steps = len(thread_counts) + len(cases) * len(graphs) * (config.rounds + 2)
    with progress("bench", steps) as advance:
        memory = [_memory(graphs, config, case, advance) for case in cases]
        ceilings = {threads: _ceilings(threads, config, advance) for threads in thread_counts}
        rows: list[Row] = []
        comparison: list[Row] = []
        for case, peaks in zip(cases, memory, strict=True):
            loads, timings = _latency(graphs, config, case, advance)
            operators = _operators(graphs, config, case, advance)
            new = [
                case_row(name, case, loads[name] | peaks[name], timings[name], graph) | {"operators": operators[name]}
                for name, graph in graphs.items()
            ]
            for row in new:
                row |= roofline_of(row, graphs[row["model"]].weight_bytes, ceilings[case["threads"]])
            rows += new
            comparison += compare_rows(new, timings)
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    settings |= RUNTIME | {"execution_provider": PROVIDERS[config.provider], "vocab_size": vocab_size}
    measured = {"ceilings": [as_row(peaks) for peaks in ceilings.values()], "cases": rows, "comparison": comparison}
    return {"machine": machine_facts(), "config": settings, **measured}


def _read_graphs(models: Mapping[str, Path]) -> dict[str, GraphFacts]:
    if not models:
        raise InputError("there are no models to measure")
    graphs = {name: read_graph(Path(path)) for name, path in models.items()}
    if len({(graph.takes_tokens, graph.decodes) for graph in graphs.values()}) > 1:
        kinds = ", ".join(f"{name}: {_kind(graph)}" for name, graph in graphs.items())
        raise InputError(f"the models take different inputs and cannot be compared ({kinds})")
    return graphs


def _kind(graph: GraphFacts) -> str:
    if graph.decodes:
        return "tokens and a cache"
    return "tokens" if graph.takes_tokens else "no tokens"


def _common_vocab_size(graphs: Mapping[str, GraphFacts], given: int | None) -> int | None:
    if not any(graph.takes_tokens for graph in graphs.values()):
        return None
    if given is not None:
        check_whole_number("vocab_size", given, 1)
        return given
    for name, graph in graphs.items():
        if graph.vocab_size is None:
            raise InputError(f"{name}: no embedding table was found in {graph.path}; give vocab_size")
    return min(graph.vocab_size for graph in graphs.values() if graph.vocab_size is not None)


def _cases(config: BenchConfig, graphs: Mapping[str, GraphFacts], vocab_size: int | None) -> list[Row]:
    tokens = any(graph.takes_tokens for graph in graphs.values())
    sequences: tuple[int | None, ...] = config.sequence_lengths if tokens else (None,)
    return [
        {
            "threads": threads,
            "batch": batch,
            "sequence": sequence,
            "new_tokens": config.new_tokens,
            "vocab_size": vocab_size,
            "end_tokens": config.end_tokens,
        }
        for threads, batch, sequence in product(
            config.thread_counts or (config.threads,), config.batch_sizes, sequences
        )
    ]


def _sizes(case: Row) -> str:
    sequence = f", sequence {case['sequence']}" if case["sequence"] else ""
    return f" at batch {case['batch']}{sequence}, {case['threads']} thread(s)"


def _memory(graphs: Mapping[str, GraphFacts], config: BenchConfig, case: Row, advance: Advance) -> dict[str, Row]:
    """The memory figures of each model in a fresh process; its times are not used, since the sampling disturbs them."""
    figures = {}
    for name, graph in graphs.items():
        with step(advance, f"memory of {name}{_sizes(case)}"), _worker(name, config, case) as worker:
            answer = _load(worker, graph, config, case, sample_memory=True)
        figures[name] = {key: value for key, value in answer.items() if key.endswith("_mb")}
    return figures


def _ceilings(threads: int, config: BenchConfig, advance: Advance) -> Ceilings:
    with step(advance, f"ceilings of this machine at {threads} thread(s)"):
        return measure_ceilings(threads, PROVIDERS[config.provider], config.timeout_s)


def _worker(name: str, config: BenchConfig, case: Row) -> WorkerProcess:
    return WorkerProcess(name + _sizes(case), config.timeout_s)


def _load(worker: WorkerProcess, graph: GraphFacts, config: BenchConfig, case: Row, sample_memory: bool = False) -> Row:
    path = str(graph.path.resolve())
    provider = PROVIDERS[config.provider]
    return worker.ask(action="load", model=path, provider=provider, case=case, sample_memory=sample_memory)


def _operators(graphs: Mapping[str, GraphFacts], config: BenchConfig, case: Row, advance: Advance) -> dict[str, Row]:
    """Kernel times by operator, each model's from a process of their own: noting them would disturb the others."""
    phases = {}
    for name, graph in graphs.items():
        with step(advance, f"operators of {name}{_sizes(case)}"), _worker(name, config, case) as worker:
            question = {"model": str(graph.path.resolve()), "provider": PROVIDERS[config.provider], "case": case}
            phases[name] = worker.ask(action="profile", runs=PROFILED_RUNS, **question)["phases"]
    return phases


def _latency(
    graphs: Mapping[str, GraphFacts], config: BenchConfig, case: Row, advance: Advance
) -> tuple[dict[str, Row], dict[str, Timings]]:
    """Loads and timings of every model, each in a worker of its own, turn by turn."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(_worker(name, config, case)) for name in graphs}
        loads = {name: _load(worker, graphs[name], config, case) for name, worker in workers.items()}
        for worker in workers.values():
            worker.ask(action="turn", min_runs=config.warmup, min_seconds=0)
        answers: dict[str, list[Row]] = {name: [] for name in graphs}
        for number, name in turns(list(graphs), config.rounds):
            with step(advance, f"{name}: round {number + 1} of {config.rounds}{_sizes(case)}"):
                answers[name].append(workers[name].ask(action="turn", min_runs=1, min_seconds=config.min_seconds))
    return loads, {name: Timings.of(rounds) for name, rounds in answers.items()}


def turns(names: list[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Who is measured when; every other round runs backwards, so that linear drift cancels.

    >>> [name for _, name in turns(["a", "b"], 3)]
    ['a', 'b', 'b', 'a', 'a', 'b']
    """
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            yield number, name
