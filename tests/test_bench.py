import json
import os
import platform
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper
from progress_record import ProgressRecord
from rich.console import Console

from converters.errors import InputError
from converters.onnx.graph_facts import read_graph
from converters.onnx.runtime import open_session
from prehab_export.cli.tables.bench import format_bench
from prehab_export.config.bench import PROVIDERS, BenchConfig
from prehab_export.measurement.benchmark import bench, turns
from prehab_export.measurement.feeds import Case, prepare_request
from prehab_export.measurement.figures import percentile_interval, ratio_interval
from prehab_export.measurement.operator_times import kernel_times
from prehab_export.measurement.worker import Times, serve
from prehab_export.measurement.worker_process import WorkerProcess
from prehab_export.system import machine
from prehab_export.system.machine import available_cores, machine_facts

VOCAB, POSITIONS, HIDDEN = 50, 24, 16
QUICK = {"threads": 1, "warmup": 0, "rounds": 2, "min_seconds": 0.0, "sequence_lengths": (8,), "new_tokens": 4}


def opened(path):
    return open_session(path)


def weights(name, *shape, scale=0.1):
    return numpy_helper.from_array(
        (np.random.default_rng(len(name)).standard_normal(shape) * scale).astype(np.float32), name
    )


def constant(name, *values):
    return numpy_helper.from_array(np.array(values, np.int64), name)


def save(path, nodes, inputs, outputs, initializers, external=False):
    values = [[helper.make_tensor_value_info(*v) for v in side] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, "toy", *values, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=external, location="model.onnx_data", size_threshold=0)
    return path


def vision(path, hidden=64, external=False):
    """pixel_values (batch, 3, 8, 8) → two wide linears → logits (batch, 4)."""
    nodes = [
        helper.make_node("Flatten", ["pixel_values"], ["flat"]),
        helper.make_node("MatMul", ["flat", "first"], ["wide"]),
        helper.make_node("MatMul", ["wide", "last"], ["logits"]),
    ]
    return save(
        path,
        nodes,
        [("pixel_values", TensorProto.FLOAT, ["batch_size", 3, 8, 8])],
        [("logits", TensorProto.FLOAT, ["batch_size", 4])],
        [weights("first", 192, hidden), weights("last", hidden, 4)],
        external,
    )


def encoder(path, id_type=TensorProto.INT64, cast=False, sequence="sequence_length"):
    """Tokens and a table of positions that ends at POSITIONS → logits."""
    ids = "ids32" if cast else "input_ids"
    nodes = [
        *([helper.make_node("Cast", ["input_ids"], [ids], to=TensorProto.INT32)] if cast else []),
        helper.make_node("Gather", ["words", ids], ["embedded"]),
        helper.make_node("Shape", ["input_ids"], ["length"], start=1),
        helper.make_node("Slice", ["positions", "zero", "length", "zero"], ["places"]),
        helper.make_node("Add", ["embedded", "places"], ["placed"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "two"], ["column"]),
        helper.make_node("Mul", ["placed", "column"], ["masked"]),
        helper.make_node("MatMul", ["masked", "head"], ["logits"]),
    ]
    return save(
        path,
        nodes,
        [(name, id_type, ["batch_size", sequence]) for name in ("input_ids", "attention_mask")],
        [("logits", TensorProto.FLOAT, ["batch_size", sequence, 3])],
        [
            weights("words", VOCAB, HIDDEN),
            weights("positions", POSITIONS, HIDDEN),
            weights("head", HIDDEN, 3),
            constant("zero", 0),
            constant("two", 2),
        ],
    )


def decoder(path):
    """A one-layer cache: the logits are the mean of all embeddings seen, read through a head.

    position_ids and attention_mask enter with weight, so that a wrong one changes the logits.
    """
    shape = ["batch_size", 1, "past_sequence_length", HIDDEN]
    grown = ["batch_size", 1, "total_sequence_length", HIDDEN]
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["embedded"]),
        helper.make_node("Gather", ["positions", "position_ids"], ["places"]),
        helper.make_node("Add", ["embedded", "places"], ["placed"]),
        helper.make_node("Unsqueeze", ["placed", "one"], ["head_first"]),
        helper.make_node("Concat", ["past_key_values.0.key", "head_first"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "head_first"], ["present.0.value"], axis=2),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "one_three"], ["weights"]),
        helper.make_node("Mul", ["present.0.value", "weights"], ["masked"]),
        helper.make_node("ReduceMean", ["masked", "two"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "head"], ["logits"]),
    ]
    return save(
        path,
        nodes,
        [
            ("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
            ("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
            ("position_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
            ("past_key_values.0.key", TensorProto.FLOAT, shape),
            ("past_key_values.0.value", TensorProto.FLOAT, shape),
        ],
        [
            ("logits", TensorProto.FLOAT, ["batch_size", 1, VOCAB]),
            ("present.0.key", TensorProto.FLOAT, grown),
            ("present.0.value", TensorProto.FLOAT, grown),
        ],
        [
            weights("words", VOCAB, HIDDEN),
            weights("positions", POSITIONS, HIDDEN),
            weights("head", HIDDEN, VOCAB),
            constant("one", 1),
            constant("two", 2),
            constant("one_three", 1, 3),
        ],
    )


@pytest.fixture
def no_orphans():
    """After the test no child process is left that was not there before."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert not left


# ---- the whole


@pytest.mark.usefixtures("no_orphans")
def test_two_vision_models(tmp_path):
    big = vision(tmp_path / "dense" / "model.onnx", hidden=40_000, external=True)
    small = vision(tmp_path / "small.onnx", hidden=64)
    record = ProgressRecord()
    config = BenchConfig(**QUICK | {"batch_sizes": (1, 3), "rounds": 5})
    result = bench({"dense": big.parent, "small": small}, config, progress=record)

    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert str(tmp_path) not in json.dumps(result)
    assert [(row["model"], row["batch"]) for row in result["cases"]] == [
        ("dense", 1),
        ("small", 1),
        ("dense", 3),
        ("small", 3),
    ]
    for row in result["cases"]:
        assert row["sequence"] is None
        assert row["tokens_per_s"] is row["inter_token_p50_ms"] is row["time_to_first_token_ms"] is None
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["throughput_per_s"] == pytest.approx(row["batch"] * 1e3 / row["mean_ms"])
        assert min(row["load_s"], row["first_ms"], row["mapped_file_mb"]) > 0
        assert len(row["round_p50_ms"]) == 5 <= row["runs"]
        assert row["runtime_resident_mb"] < row["peak_resident_mb"]
        assert row["peak_resident_mb"] <= row["peak_anonymous_mb"] + row["mapped_file_mb"] + 0.01
        (phase,) = row["operators"]
        counts = {entry["op"]: entry["count"] for entry in row["operators"][phase]}
        assert phase == "request"
        assert counts["MatMul"] == 2
        assert all(entry["ms"] >= 0 for entry in row["operators"][phase])
        hidden = 40_000 if row["model"] == "dense" else 64
        assert row["gflop"] == pytest.approx(2e-9 * row["batch"] * hidden * (192 + 4))
        assert row["weight_mb"] == pytest.approx(4e-6 * hidden * (192 + 4))
        assert row["share_of_bound"] == pytest.approx(row["bound_ms"] / row["p50_ms"])
        assert row["p50_low_ms"] <= row["p50_ms"] <= row["p50_high_ms"] <= row["p99_high_ms"]
    dense, other = result["cases"][:2]
    assert dense["file_mb"] == pytest.approx(sum(f.stat().st_size for f in big.parent.iterdir()) / 1e6)
    assert other["file_mb"] == small.stat().st_size / 1e6
    assert dense["peak_resident_mb"] - other["peak_resident_mb"] > 0.5 * (dense["file_mb"] - other["file_mb"])
    compared = result["comparison"][0]
    assert (compared["model"], compared["baseline"], compared["batch"]) == ("small", "dense", 1)
    assert compared["speedup"] == pytest.approx(dense["p50_ms"] / other["p50_ms"])
    assert 0 < compared["speedup_low"] <= compared["speedup_high"]
    assert compared["size_ratio"] == pytest.approx(other["file_mb"] / dense["file_mb"])
    assert 0 < compared["model_memory_ratio"] < compared["memory_ratio"] < 1
    record.check_all_done("bench")
    # Each note twice: while its step is done, and once it is.
    first_case = [note.split(":")[0] for note in record.notes[::2] if "round" in note and "batch 1" in note]
    assert first_case == ["dense", "small", "small", "dense", "dense", "small", "small", "dense", "dense", "small"]


@pytest.mark.usefixtures("no_orphans")
def test_several_numbers_of_threads(tmp_path):
    models = {"dense": vision(tmp_path / "a.onnx"), "same": vision(tmp_path / "b.onnx")}
    result = bench(models, BenchConfig(**QUICK | {"thread_counts": (1, 2)}))
    assert [(row["model"], row["threads"]) for row in result["cases"]] == [
        ("dense", 1),
        ("same", 1),
        ("dense", 2),
        ("same", 2),
    ]
    assert [row["threads"] for row in result["comparison"]] == [1, 2]
    assert [peak["threads"] for peak in result["ceilings"]] == [1, 2]
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(format_bench(result))
    assert "1 or 2 thread(s)" in console.export_text()


def test_a_provider_that_is_not_there(tmp_path):
    there = onnxruntime.get_available_providers()
    missing = next(name for name, provider in PROVIDERS.items() if provider not in there)
    with pytest.raises(InputError, match=rf"has no {PROVIDERS[missing]}; it has .*cpu"):
        bench({"m": tmp_path / "looked-for-later.onnx"}, BenchConfig(**QUICK | {"provider": missing}))
    with pytest.raises(InputError, match="provider"):
        BenchConfig(provider="abacus")


def test_a_provider_that_does_not_start_is_not_replaced(tmp_path):
    """ONNX Runtime goes on with the CPU's kernels and a log line; a measurement must not."""
    with pytest.raises(Exception, match=r"did not start|not in available provider"):
        open_session(vision(tmp_path / "m.onnx"), provider=PROVIDERS["cuda"])


@pytest.mark.usefixtures("no_orphans")
def test_encoders_at_several_lengths(tmp_path):
    models = {
        "dense": encoder(tmp_path / "a.onnx"),
        "same": encoder(tmp_path / "b.onnx", TensorProto.INT32, cast=True),
    }
    result = bench(models, BenchConfig(**QUICK | {"sequence_lengths": (1, 8, POSITIONS)}))
    assert result["config"]["vocab_size"] == VOCAB
    assert [row["sequence"] for row in result["cases"]] == [1, 1, 8, 8, POSITIONS, POSITIONS]
    assert [row["sequence"] for row in result["comparison"]] == [1, 8, POSITIONS]
    assert result["comparison"][0]["speedup_low"] is None, "two rounds are too few for an interval"


@pytest.mark.usefixtures("no_orphans")
def test_decoders_are_timed_by_token(tmp_path):
    models = {"dense": decoder(tmp_path / "a.onnx"), "same": decoder(tmp_path / "b.onnx")}
    result = bench(models, BenchConfig(**QUICK | {"batch_sizes": (2,)}))
    for row in result["cases"]:
        assert min(row["time_to_first_token_ms"], row["inter_token_p50_ms"], row["tokens_per_s"]) > 0
        assert row["inter_token_p50_ms"] <= row["inter_token_p90_ms"]
        assert set(row["operators"]) == {"first_token", "next_token"}
        for entries in row["operators"].values():
            assert {entry["op"]: entry["count"] for entry in entries}["MatMul"] == 1
    assert result["comparison"][0]["first_token_speedup"] > 0
    assert result["comparison"][0]["inter_token_speedup"] > 0


def test_one_new_token_has_no_steps(tmp_path):
    row = bench({"m": decoder(tmp_path / "m.onnx")}, BenchConfig(**QUICK | {"new_tokens": 1}))["cases"][0]
    assert row["tokens_per_s"] is None
    assert row["inter_token_p50_ms"] is None
    assert row["time_to_first_token_ms"] == row["p50_ms"]


def test_kernel_times_are_told_apart_by_run_and_phase():
    """Two requests of a first run and one step; the first request is warm-up. Times in µs, as the profiler has them."""

    def run(start, *kernels):
        yield {"cat": "Session", "name": "model_run", "ts": start, "dur": 90}
        for at, (op, took) in enumerate(kernels):
            args = {"op_name": op, "input_type_shape": [{"float": [5, 50]}], "output_type_shape": [{"float": [5, 40]}]}
            yield {"cat": "Node", "name": f"n{at}_kernel_time", "ts": start + 10 * at, "dur": took, "args": args}
            yield {"cat": "Node", "name": f"n{at}_fence_before", "ts": start + 10 * at, "dur": 0, "args": args}

    events = [
        *run(0, ("MatMul", 900)),
        *run(100, ("MatMul", 900)),
        *run(200, ("MatMul", 4000), ("Add", 100), ("MatMul", 2000)),
        *run(300, ("MatMul", 1000), ("Add", 50)),
    ]
    assert kernel_times([*events, {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 9}], 1) == {
        "first_token": [
            {"op": "MatMul", "count": 2, "ms": 6.0, "gflop": 4e-5},
            {"op": "Add", "count": 1, "ms": 0.1, "gflop": 0.0},
        ],
        "next_token": [
            {"op": "MatMul", "count": 1, "ms": 1.0, "gflop": 2e-5},
            {"op": "Add", "count": 1, "ms": 0.05, "gflop": 0.0},
        ],
    }


def test_table(tmp_path):
    def rendered(models):
        console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(format_bench(bench(models, BenchConfig(**QUICK | {"rounds": 5}))))
        return console.export_text()

    path = vision(tmp_path / "m.onnx")
    text = rendered({"dense": path, "low-rank": path})
    assert "low-rank" in text
    assert "×" in text
    assert "seq" not in text
    path = decoder(tmp_path / "d.onnx")
    text = rendered({"dense": path, "low-rank": path})
    assert "seq" in text
    assert "tok/s" in text
    assert "…" not in text


# ---- what is fed


def test_texts_end_with_the_tokens_that_models_look_for(tmp_path):
    session = opened(encoder(tmp_path / "m.onnx"))
    case = Case(threads=1, batch=3, sequence=9, new_tokens=1, vocab_size=VOCAB, end_tokens=[2, 5])
    ids = prepare_request(session, case).prefill["input_ids"].numpy()
    assert ids[:, -2:].tolist() == [[2, 5]] * 3
    assert not np.isin(ids[:, :-2], [2, 5]).any()
    assert 0 <= ids.min() <= ids.max() < VOCAB
    short = prepare_request(session, replace(case, sequence=2)).prefill["input_ids"].numpy()
    assert short.shape == (3, 2)


@pytest.mark.parametrize("batch", [1, 2])
def test_decode_feeds_the_cache_back(tmp_path, batch):
    """Prefill and steps end at the logits that one pass over all the tokens gives."""
    session = opened(decoder(tmp_path / "m.onnx"))
    request = prepare_request(session, Case(threads=1, batch=batch, sequence=5, new_tokens=6, vocab_size=VOCAB))
    seen = []

    class Recorder:
        def run_with_ort_values(self, outputs, feeds):
            seen.append(session.run_with_ort_values(outputs, feeds))
            return seen[-1]

    times = Times()
    serve(SimpleNamespace(**vars(request) | {"session": Recorder()}), times)
    assert (len(times.total_ms), len(times.first_token_ms), len(times.step_ms)) == (1, 1, 5)
    assert times.total_ms[0] == pytest.approx(times.first_token_ms[0] + sum(times.step_ms))

    ids = np.concatenate([feeds["input_ids"].numpy() for feeds in (request.prefill, *request.steps)], axis=1)
    assert ids.shape == (batch, 10)
    assert ids.max() < VOCAB
    empty = np.zeros((batch, 1, 0, HIDDEN), np.float32)
    whole = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(10), (batch, 1)),
        "past_key_values.0.key": empty,
        "past_key_values.0.value": empty,
    }
    logits, key, _ = session.run(None, whole)
    np.testing.assert_allclose(seen[-1][0].numpy(), logits, atol=1e-6)
    np.testing.assert_allclose(seen[-1][1].numpy(), key, atol=1e-6)


def test_inputs_are_the_same_for_every_model(tmp_path):
    case = Case(threads=1, batch=2, sequence=8, new_tokens=4, vocab_size=VOCAB)
    requests = [prepare_request(opened(encoder(tmp_path / n)), case) for n in ("a.onnx", "b.onnx")]
    ids = [request.prefill["input_ids"].numpy() for request in requests]
    np.testing.assert_array_equal(*ids)
    assert len(np.unique(ids[0])) > 1


def test_worker_imports_only_the_runtime():
    code = "import sys, prehab_export.measurement.worker; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    tops = {name.split(".")[0] for name in loaded.split()}
    assert "onnxruntime" in tops
    assert not tops & {"torch", "transformers", "onnx", "psutil", "rich"}


# ---- what is read from a graph


def test_vocab_size_through_a_quantised_table(tmp_path):
    nodes = [
        helper.make_node("DequantizeLinear", ["words", "scale"], ["table"]),
        helper.make_node("Gather", ["table", "input_ids"], ["logits"]),
    ]
    words = numpy_helper.from_array(np.ones((VOCAB, 4), np.int8), "words")
    path = save(
        tmp_path / "m.onnx",
        nodes,
        [("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])],
        [("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", 4])],
        [words, numpy_helper.from_array(np.float32(0.1), "scale")],
    )
    assert read_graph(path).vocab_size == VOCAB


def test_vocab_size_must_be_given_where_there_is_no_table(tmp_path):
    nodes = [helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT)]
    shape = ["batch_size", "sequence_length"]
    path = save(
        tmp_path / "m.onnx",
        nodes,
        [("input_ids", TensorProto.INT64, shape)],
        [("logits", TensorProto.FLOAT, shape)],
        [],
    )
    with pytest.raises(InputError, match="give vocab_size"):
        bench({"m": path}, BenchConfig(**QUICK))
    assert bench({"m": path}, BenchConfig(**QUICK), vocab_size=7)["config"]["vocab_size"] == 7


# ---- refusals


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 0},
        {"threads": 1.5},
        {"thread_counts": (0,)},
        {"batch_sizes": ()},
        {"batch_sizes": (0,)},
        {"sequence_lengths": (8, -1)},
        {"warmup": -1},
        {"rounds": 0},
        {"new_tokens": 0},
        {"min_seconds": float("nan")},
        {"min_seconds": -1.0},
        {"timeout_s": 0.0},
    ],
)
def test_config_is_validated(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        BenchConfig(**wrong)


@pytest.mark.usefixtures("no_orphans")
def test_sequence_beyond_the_table_of_positions(tmp_path):
    with pytest.raises(InputError, match=r"sequence 25.*table of positions") as caught:
        bench({"m": encoder(tmp_path / "m.onnx")}, BenchConfig(**QUICK | {"sequence_lengths": (POSITIONS + 1,)}))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_orphans")
def test_decoding_beyond_the_table_of_positions(tmp_path):
    config = BenchConfig(**QUICK | {"sequence_lengths": (POSITIONS,), "new_tokens": 2})
    with pytest.raises(InputError, match="table of positions"):
        bench({"m": decoder(tmp_path / "m.onnx")}, config)


def test_sequence_that_the_graph_fixes_otherwise(tmp_path):
    with pytest.raises(InputError, match=r"declares input_ids as .*16.*but this case needs \[1, 8\]"):
        bench({"m": encoder(tmp_path / "m.onnx", sequence=16)}, BenchConfig(**QUICK))


def test_models_of_different_kinds(tmp_path):
    models = {"a": vision(tmp_path / "a.onnx"), "b": encoder(tmp_path / "b.onnx")}
    with pytest.raises(InputError, match=r"a: no tokens, b: tokens"):
        bench(models, BenchConfig(**QUICK))


def test_files_that_are_no_models(tmp_path):
    with pytest.raises(InputError, match="no ONNX file"):
        read_graph(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(InputError, match="not an ONNX"):
        read_graph(tmp_path / "text.onnx")
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(InputError, match="not an ONNX"):
        read_graph(tmp_path / "empty.onnx")
    path = vision(tmp_path / "moved" / "model.onnx", external=True)
    (path.parent / "model.onnx_data").unlink()
    with pytest.raises(InputError, match=r"model\.onnx_data, which is not beside it"):
        read_graph(path)
    with pytest.raises(InputError, match="no models"):
        bench({}, BenchConfig())


def test_unknown_input_is_named(tmp_path):
    nodes = [helper.make_node("Identity", ["strange"], ["logits"])]
    value = ("strange", TensorProto.INT64, ["batch_size", 2])
    path = save(tmp_path / "m.onnx", nodes, [value], [("logits", *value[1:])], [])
    with pytest.raises(InputError, match="strange"):
        bench({"m": path}, BenchConfig(**QUICK))


# ---- workers that fail


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A stand-in for the worker: source → name of a module that a child can run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def write(source):
        (tmp_path / "standin.py").write_text(textwrap.dedent(source))
        return "standin"

    return write


@pytest.mark.usefixtures("no_orphans")
def test_killed_worker_is_reported_with_its_signal(program):
    name = program("import os, signal; input(); os.kill(os.getpid(), signal.SIGKILL)")
    with WorkerProcess("big", 60, name) as worker, pytest.raises(InputError, match=r"big: .*SIGKILL.*memory"):
        worker.ask(action="load")


@pytest.mark.usefixtures("no_orphans")
def test_defect_of_a_worker_carries_its_stderr(program):
    name = program("input(); raise KeyError('the cause')")
    with WorkerProcess("m", 60, name) as worker, pytest.raises(RuntimeError, match="exit code 1") as caught:
        worker.ask(action="load")
    assert not isinstance(caught.value, InputError)
    assert "the cause" in str(caught.value.__cause__)


@pytest.mark.usefixtures("no_orphans")
def test_worker_that_dies_before_it_is_asked(program):
    with WorkerProcess("m", 60, program("raise SystemExit(3)")) as worker:
        while psutil.Process(worker.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match="exit code 3"):
            worker.ask(action="load", filler="x" * 1_000_000)


@pytest.mark.usefixtures("no_orphans")
def test_time_limit(program):
    name, message = program("import time; time.sleep(600)"), r"slow: no answer within 0\.5 s"
    with WorkerProcess("slow", 0.5, name) as worker, pytest.raises(InputError, match=message):
        worker.ask(action="load")


@pytest.mark.usefixtures("no_orphans")
def test_interrupt_leaves_no_worker(tmp_path):
    def interrupt(note):
        if "round 2" in note:
            assert psutil.Process().children()
            raise KeyboardInterrupt

    path = vision(tmp_path / "m.onnx")
    with pytest.raises(KeyboardInterrupt):
        bench({"a": path, "b": path}, BenchConfig(**QUICK), progress=ProgressRecord(interrupt))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    vision(tmp_path / "m.onnx")
    code = """
        from pathlib import Path
        from prehab_export import BenchConfig, bench
        from progress_record import ProgressRecord
        told = ProgressRecord(lambda note: print(note, flush=True))
        bench({"m": Path("m.onnx")}, BenchConfig(rounds=10**6), progress=told)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    while "round 2" not in parent.stdout.readline():
        assert parent.poll() is None
    workers = psutil.Process(parent.pid).children()
    assert workers
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


# ---- figures


def test_rounds_alternate():
    order = [name for _, name in turns(["a", "b"], 4)]
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_ratio_interval():
    rng = np.random.default_rng(1)
    steady = [np.full(3, 2.0)] * 6, [np.full(5, 0.5)] * 6
    assert ratio_interval(*steady) == (4.0, 4.0)
    # Both models slow down together in a noisy round: the interval stays close to their ratio.
    noise = rng.uniform(1, 10, 20)
    low, high = ratio_interval([3 * np.full(9, n) for n in noise], [np.full(9, n) for n in noise])
    assert low == pytest.approx(3)
    assert high == pytest.approx(3)
    low, high = ratio_interval([rng.normal(2, 0.1, 50) for _ in range(20)], [rng.normal(1, 0.1, 50) for _ in range(20)])
    assert 1.9 < low < 2 < high < 2.1
    assert ratio_interval([np.ones(9)] * 4, [np.ones(9)] * 4) == (None, None)


def test_rounds_are_drawn_whole():
    """Runs of one round are no news of each other: six rounds say as little with 50 runs in each as with one."""
    few, many = ([np.full(runs, float(level)) for level in range(6)] for runs in (1, 50))
    assert percentile_interval(many, 50) == pytest.approx(percentile_interval(few, 50))
    low, high = percentile_interval(many, 50)
    assert low <= 1 < 4 <= high


# ---- the machine


def test_machine_facts_name_no_person():
    facts = machine_facts()
    text = json.dumps(facts, allow_nan=False)
    assert facts["libraries"]["onnxruntime"].count(".") >= 1
    assert 1 <= facts["available_cores"] <= facts["logical_cores"]
    assert facts["memory_mb"] > 0
    assert f"{Path.home()}/" not in text
    assert platform.node() not in facts.values()
    assert facts["cpu"] is None or "/" not in facts["cpu"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_available_cores_follow_affinity():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 1), ("10000 100000", 1), ("max 100000", None)])
def test_available_cores_follow_a_container(tmp_path, monkeypatch, quota, cores):
    (tmp_path / "cpu.max").write_text(quota + "\n")
    (tmp_path / "memory.max").write_text("512000000\n")
    expected = available_cores() if cores is None else cores
    monkeypatch.setattr(machine, "_cgroup_folders", lambda controller: [] if controller else [tmp_path])
    assert available_cores() == expected
    assert machine_facts()["memory_limit_mb"] == 512
