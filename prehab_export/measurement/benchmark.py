"""Compare the latency, memory and size of ONNX models on ONNX Runtime.

The first model is the baseline. Three measures make the results comparable:

- Latency is measured in *rounds*. In each round every model has a turn of the same duration. The order of models is
  reversed from round to round, so that drift of clock speed and temperature affects all models equally. Each model runs
  in its own worker process. While a worker waits, it blocks on its stdin and its threads sleep.
- Memory is measured first, in a fresh process for each model and case. A model that cannot run therefore fails before
  the slow measurement of latency starts.
- Speedups are ratios of medians. Their confidence intervals come from a bootstrap over rounds, because runs in the same
  round are affected by the same load on the machine.
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
from prehab_export.measurement.roofline import measure_ceilings, roofline_of
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
    has_baseline: bool = True,
) -> Row:
    """Measure every model in every case.

    Args:
        models: name → ONNX file (or a folder with ``model.onnx``). The first model is the baseline.
        has_baseline: False if no model is the baseline; nothing is compared then.
        vocab_size: upper bound of the random token ids. When None, it is read from the embedding table.

    Returns:
        A dictionary of JSON types with the keys machine, config, ceilings, cases and comparison. The names of figures
        contain their units; an MB is 10⁶ bytes. A figure is None if it does not apply or is unknown.

        In ``cases``, times such as p50_ms are per request. For a decoder with a cache, a request is a prefill and
        ``new_tokens`` tokens. ``operators`` lists kernel times per operator for each phase of a request. ``bound_ms``
        is the lower bound that the machine's ``ceilings`` set (see ``roofline``); for a decoder it is per new token.

        In ``comparison``, speedups are baseline over model: above 1 is faster. ``memory_ratio`` and ``size_ratio`` are
        model over baseline: below 1 is smaller. ``model_memory_ratio`` excludes the memory that Python and ONNX Runtime
        use before a model is loaded.

    Raises:
        InputError: a model or the provider is missing, or a model fails at one of the sizes, runs out of memory, or
            exceeds the time limit.
    """
    check_provider(config.provider)
    graphs = _read_graphs(models)
    vocab_size = _common_vocab_size(graphs, vocab_size)
    cases = _make_cases(config, graphs, vocab_size)
    thread_counts = list(dict.fromkeys(case["threads"] for case in cases))
    # Each model has its rounds in each case, and one step each for memory and operators.
    steps = len(thread_counts) + len(cases) * len(graphs) * (config.rounds + 2)
    with progress("bench", steps) as advance:
        memory = [_measure_memory(graphs, config, case, advance) for case in cases]
        ceilings = {}
        for threads in thread_counts:
            with step(advance, f"ceilings of this machine at {threads} thread(s)"):
                ceilings[threads] = measure_ceilings(threads, PROVIDERS[config.provider], config.timeout_s)
        rows: list[Row] = []
        comparison: list[Row] = []
        for case, case_memory in zip(cases, memory, strict=True):
            load_times, timings = _measure_latency(graphs, config, case, advance)
            operators = _profile_operators(graphs, config, case, advance)
            case_rows = [
                case_row(name, case, load_times[name] | case_memory[name], timings[name], graph)
                | {"operators": operators[name]}
                for name, graph in graphs.items()
            ]
            for row in case_rows:
                row |= roofline_of(row, graphs[row["model"]].weight_bytes, ceilings[case["threads"]])
            rows += case_rows
            comparison += compare_rows(case_rows, timings) if has_baseline else []
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    settings |= RUNTIME | {"execution_provider": PROVIDERS[config.provider], "vocab_size": vocab_size}
    return {
        "machine": machine_facts(),
        "config": settings,
        "ceilings": [asdict(values) for values in ceilings.values()],
        "cases": rows,
        "comparison": comparison,
    }


def _read_graphs(models: Mapping[str, Path]) -> dict[str, GraphFacts]:
    if not models:
        raise InputError("there are no models to measure")
    graphs = {name: read_graph(Path(path)) for name, path in models.items()}
    if len({(graph.takes_tokens, graph.decodes) for graph in graphs.values()}) > 1:
        inputs = ", ".join(f"{name}: {_describe_inputs(graph)}" for name, graph in graphs.items())
        raise InputError(f"the models take different inputs and cannot be compared ({inputs})")
    return graphs


def _describe_inputs(graph: GraphFacts) -> str:
    if graph.decodes:
        return "tokens and a cache"
    return "tokens" if graph.takes_tokens else "no tokens"


def _common_vocab_size(graphs: Mapping[str, GraphFacts], vocab_size: int | None) -> int | None:
    if not any(graph.takes_tokens for graph in graphs.values()):
        return None
    if vocab_size is not None:
        check_whole_number("vocab_size", vocab_size, 1)
        return vocab_size
    for name, graph in graphs.items():
        if graph.vocab_size is None:
            raise InputError(f"{name}: no embedding table was found in {graph.path}; give vocab_size")
    return min(graph.vocab_size for graph in graphs.values() if graph.vocab_size is not None)


def _make_cases(config: BenchConfig, graphs: Mapping[str, GraphFacts], vocab_size: int | None) -> list[Row]:
    takes_tokens = any(graph.takes_tokens for graph in graphs.values())
    sequences: tuple[int | None, ...] = config.sequence_lengths if takes_tokens else (None,)
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


def _describe_sizes(case: Row) -> str:
    sequence = f", sequence {case['sequence']}" if case["sequence"] else ""
    return f" at batch {case['batch']}{sequence}, {case['threads']} thread(s)"


def _measure_memory(
    graphs: Mapping[str, GraphFacts], config: BenchConfig, case: Row, advance: Advance
) -> dict[str, Row]:
    """Return the memory figures of each model, measured in a fresh process.

    The times from that process are discarded, because sampling memory slows it down.
    """
    figures = {}
    for name, graph in graphs.items():
        with step(advance, f"memory of {name}{_describe_sizes(case)}"), _start_worker(name, config, case) as worker:
            answer = _load_model(worker, graph, config, case, sample_memory=True)
        figures[name] = {key: value for key, value in answer.items() if key.endswith("_mb")}
    return figures


def _start_worker(name: str, config: BenchConfig, case: Row) -> WorkerProcess:
    return WorkerProcess(name + _describe_sizes(case), config.timeout_s)


def _load_model(
    worker: WorkerProcess, graph: GraphFacts, config: BenchConfig, case: Row, sample_memory: bool = False
) -> Row:
    path = str(graph.path.resolve())
    provider = PROVIDERS[config.provider]
    return worker.ask(action="load", model=path, provider=provider, case=case, sample_memory=sample_memory)


def _profile_operators(
    graphs: Mapping[str, GraphFacts], config: BenchConfig, case: Row, advance: Advance
) -> dict[str, Row]:
    """Return the kernel times of each model by operator.

    They are measured in a separate process, because profiling would slow down the measurement of latency.
    """
    phases = {}
    for name, graph in graphs.items():
        with step(advance, f"operators of {name}{_describe_sizes(case)}"), _start_worker(name, config, case) as worker:
            question = {"model": str(graph.path.resolve()), "provider": PROVIDERS[config.provider], "case": case}
            phases[name] = worker.ask(action="profile", runs=PROFILED_RUNS, **question)["phases"]
    return phases


def _measure_latency(
    graphs: Mapping[str, GraphFacts], config: BenchConfig, case: Row, advance: Advance
) -> tuple[dict[str, Row], dict[str, Timings]]:
    """Return the load times and the timings of every model. Each model runs in its own worker, and they take turns."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(_start_worker(name, config, case)) for name in graphs}
        load_times = {name: _load_model(worker, graphs[name], config, case) for name, worker in workers.items()}
        for worker in workers.values():
            worker.ask(action="turn", min_runs=config.warmup, min_seconds=0)
        answers: dict[str, list[Row]] = {name: [] for name in graphs}
        for number, name in turns(list(graphs), config.rounds):
            with step(advance, f"{name}: round {number + 1} of {config.rounds}{_describe_sizes(case)}"):
                answers[name].append(workers[name].ask(action="turn", min_runs=1, min_seconds=config.min_seconds))
    return load_times, {name: Timings.from_answers(rounds) for name, rounds in answers.items()}


def turns(names: list[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield the number of the round and the model of each turn. Every second round runs backwards, so that linear drift
    cancels.

    >>> [name for _, name in turns(["a", "b"], 3)]
    ['a', 'b', 'b', 'a', 'a', 'b']
    """
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            yield number, name
