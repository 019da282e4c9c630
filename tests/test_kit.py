"""Kits: made, taken elsewhere, run, read back; and everything that can be wrong with them there."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import onnx
import psutil
import pytest
from progress_record import ProgressRecord
from small_models import build, truncated
from test_pipeline import invoke, vit_options

from converters.errors import InputError
from converters.onnx.export import export_onnx
from converters.onnx.form import GraphForm
from converters.onnx.quantize import quantize_graph
from prehab_export.config.bench import BenchConfig
from prehab_export.config.target import Target
from prehab_export.measurement.targets import limits
from prehab_export.measurement.targets.kit import KIT, RUNNER, make_kit, read_kit
from prehab_export.measurement.targets.limits import Limits, run_limited
from prehab_export.measurement.targets.local import matrix, measure_locally
from prehab_export.measurement.targets.results import read_results
from prehab_export.pipeline.fitting.target import check_target
from prehab_export.pipeline.target_bench import bench_on_target
from prehab_export.pipeline.target_results import load_target_results
from prehab_export.system.errors import ParityError, TargetError

QUICK = BenchConfig(threads=1, sequence_lengths=(6,), warmup=0, rounds=2, min_seconds=0.0, new_tokens=4)
TASKS = {"vit": "image-classification", "bert": "text-classification", "llama": "text-generation"}


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    """A kit of a dense and a factored model for each family, made once; copy it before changing it."""
    made = {}

    def kit_of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            dense, small = build(family), truncated(build(family), 6)
            graphs = {
                "dense": export_onnx(dense, TASKS[family], folder / "dense" / "model.onnx").path,
                "low rank": export_onnx(small, TASKS[family], folder / "low" / "model.onnx").path,
            }
            graphs["low rank int8"] = quantize_graph(graphs["low rank"], folder / "low" / "int8.onnx", "int8")
            made[family] = make_kit(graphs, folder / "kit", QUICK)
        return made[family]

    return kit_of


@pytest.fixture
def own_kit(kits, tmp_path):
    shutil.copytree(kits("vit").folder, tmp_path / "kit")
    return read_kit(tmp_path / "kit")


def run_kit(folder, *arguments, **options):
    command = [sys.executable, str(folder / RUNNER), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, **options)


def test_a_kit_takes_nothing_from_the_graph_that_it_was_made_of(tmp_path):
    """onnx reads no weights in a file that has another name somewhere."""
    graph = tmp_path / "model.onnx"
    export_onnx(build("vit"), TASKS["vit"], graph, GraphForm(external_data_threshold=0))
    (tmp_path / "link.onnx").symlink_to(graph)
    kit = make_kit({"direct": graph, "by a link": tmp_path / "link.onnx"}, tmp_path / "kit", QUICK)
    for path in (graph, *(kit.folder / model["file"] for model in kit.facts["models"])):
        assert path.with_name("model.onnx_data").is_file()
        onnx.load(path)
    assert not any(path.is_symlink() for path in kit.folder.rglob("*"))


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=pytest.mark.slow if family == "llama" else []) for family in TASKS]
)
def test_a_kit_is_run_where_nothing_else_is(kits, family, tmp_path):
    """In another folder, without this package on the path."""
    shutil.copytree(kits(family).folder, tmp_path / "elsewhere")
    done = run_kit(tmp_path / "elsewhere", "--threads", "1", "--threads", "2", env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    results = read_results(tmp_path / "elsewhere" / "results.json", kits(family).digest)
    names = ["dense", "low rank", "low rank int8"]
    assert [(row["model"], row["threads"]) for row in results["cases"]] == [(n, t) for t in (1, 2) for n in names]
    for row in results["cases"]:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert len(row["rounds"]) == 2
        assert row["peak_mb"] > 10
        assert (row["tokens_per_s"] is not None) == (family == "llama")
    assert all(row["ok"] for row in results["parity"])
    assert {row["same_tokens"] for row in results["parity"]} == {True if family == "llama" else None}
    assert [row["model"] for row in results["comparison"]] == names[1:] * 2
    assert results["device"]["runtime_version"]
    assert str(tmp_path) not in json.dumps(results)


def test_the_runner_needs_nothing_of_ours(kits):
    code = "import sys; sys.argv = ['x']; import runpy; runpy.run_path(sys.argv[0] if 0 else %r); print(*sys.modules)"
    path = str(kits("vit").folder / RUNNER)
    done = subprocess.run([sys.executable, "-c", code % path], capture_output=True, text=True, check=True, cwd="/")
    tops = {name.split(".")[0] for name in done.stdout.split()}
    assert "onnxruntime" in tops
    assert not tops & {"prehab_export", "converters", "torch", "onnx", "transformers", "click"}


def test_expected_answers_are_those_of_the_graph(kits):
    kit = kits("bert")
    (case,) = kit.facts["cases"]
    assert set(case["inputs"]) == {"input_ids", "attention_mask", "token_type_ids"}
    assert np.load(kit.folder / case["inputs"]["input_ids"]).shape == (1, 6)
    dense, low = (np.load(kit.folder / case["expected"][slug]["logits"]) for slug in ("dense", "low-rank"))
    assert not np.allclose(dense, low)


@pytest.mark.parametrize("damage", ["models/dense/model.onnx", "data/batch1/pixel_values.npy", "README.md"])
def test_a_damaged_kit_is_refused(own_kit, damage):
    file = own_kit.folder / damage
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # the copy may share its data with the original
    file.write_bytes(bytes(content))
    done = run_kit(own_kit.folder)
    assert done.returncode == 2
    assert f"error: {damage} is missing or damaged" in done.stderr
    assert not (own_kit.folder / "results.json").exists()


def rewritten(kit, change):
    facts = json.loads((kit.folder / KIT).read_text())
    change(facts)
    (kit.folder / KIT).write_text(json.dumps(facts))
    return read_kit(kit.folder)


def test_wrong_answers_end_with_code_3_and_no_times(own_kit):
    kit = rewritten(own_kit, lambda facts: facts["tolerance"]["low-rank"].update(relative=-1.0))
    done = run_kit(kit.folder)
    assert done.returncode == 3
    assert "low rank is off by" in done.stderr
    results = json.loads((kit.folder / "results.json").read_text())
    assert results["cases"] == []
    assert [row["model"] for row in results["parity"] if not row["ok"]] == ["low rank"]
    with pytest.raises(ParityError, match="low rank is off"):
        measure_locally(kit, Limits())


def test_a_runtime_that_cannot_open_a_graph_is_said(own_kit):
    path = own_kit.folder / "models/dense/model.onnx"
    path.unlink()
    path.write_bytes(b"not a graph")

    def accept(facts):
        import hashlib

        facts["files"]["models/dense/model.onnx"] = {
            "bytes": 11,
            "sha256": hashlib.sha256(b"not a graph").hexdigest(),
        }

    done = run_kit(rewritten(own_kit, accept).folder)
    assert done.returncode == 2
    assert "dense does not open on onnxruntime" in done.stderr
    assert "install that or a later one" in done.stderr


def test_missing_packages_are_named(own_kit):
    done = subprocess.run(
        [sys.executable, "-S", str(own_kit.folder / RUNNER)], capture_output=True, text=True, env={"PATH": ""}
    )
    assert done.returncode == 1
    assert "python -m pip install onnxruntime numpy" in done.stderr


def test_results_that_cannot_be_written(own_kit):
    done = run_kit(own_kit.folder, "--check-only", "--out", "/proc/no-such-folder/results.json")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--model", "nothing"), "the kit has no nothing; it has dense, low-rank"),
        (("--case", "nothing"), "the kit has no nothing; it has batch1"),
        (("--threads", "0"), "threads and rounds must be 1 or more"),
    ],
)
def test_wrong_arguments_of_the_runner(own_kit, arguments, sentence):
    done = run_kit(own_kit.folder, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_a_runner_ends_when_its_stdin_closes(own_kit):
    process = subprocess.Popen(
        [sys.executable, str(own_kit.folder / RUNNER), "--end-with-stdin", "--rounds", "1000000"],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=own_kit.folder,
    )  # fmt: skip
    while "round" not in process.stderr.readline():
        assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=30) == 130
    process.stderr.close()
    assert not list(own_kit.folder.glob("results*"))


def test_a_killed_runner_leaves_nothing_half_written(own_kit):
    process = subprocess.Popen(
        [sys.executable, str(own_kit.folder / RUNNER), "--rounds", "1000000"],
        stderr=subprocess.PIPE, text=True, cwd=own_kit.folder,
    )  # fmt: skip
    while "round" not in process.stderr.readline():
        assert process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not list(own_kit.folder.glob("results*"))
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_folders_that_are_no_place_for_a_kit(kits, tmp_path):
    model = kits("vit").folder / "models/dense/model.onnx"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds something that is not a kit"):
        make_kit({"dense": model}, tmp_path / "full", QUICK)
    with pytest.raises(InputError, match="no ONNX file"):
        make_kit({"dense": tmp_path / "nothing.onnx"}, tmp_path / "kit", QUICK)
    with pytest.raises(InputError, match="different inputs"):
        make_kit({"a": model, "b": kits("bert").folder / "models/dense/model.onnx"}, tmp_path / "kit", QUICK)
    assert not (tmp_path / "kit").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    first = make_kit({"dense": model}, tmp_path / "kit", QUICK)
    assert make_kit({"dense": model}, tmp_path / "kit", QUICK).facts == first.facts
    (tmp_path / "kit" / "results.json").write_text("measured on the board", encoding="utf-8")
    with pytest.raises(InputError, match="--target-results"):
        make_kit({"dense": model}, tmp_path / "kit", QUICK)
    assert (tmp_path / "kit" / "results.json").read_text(encoding="utf-8") == "measured on the board"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1}', '{"format": 99}'])
def test_what_is_no_results_file(tmp_path, text):
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "phone.json").write_text(text)
    with pytest.raises(InputError, match=r"phone\.json"):
        load_target_results(tmp_path)


def test_results_of_another_kit_are_refused(kits, own_kit):
    assert run_kit(own_kit.folder, "--check-only").returncode == 0
    with pytest.raises(InputError, match="another kit"):
        read_results(own_kit.folder / "results.json", kits("bert").digest)


# ---- limits


def test_limits_hold():
    greedy = [sys.executable, "-c", "x = bytearray(400_000_000); print(len(x))"]
    assert run_limited(greedy, Limits()).code == 0
    refused = run_limited(greedy, Limits(memory_mb=100))
    assert refused.code != 0
    assert refused.kind in ("cgroup", "RLIMIT_DATA")
    core = min(os.sched_getaffinity(0))
    seen = run_limited([sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"], Limits(cores=(core,)))
    assert seen.output.strip() == str({core})


def test_bad_limits():
    with pytest.raises(InputError, match="leaves nothing"):
        Limits(memory_mb=0)
    with pytest.raises(InputError, match="core 99999"):
        Limits(cores=(99999,))


def test_limits_that_this_system_lacks_are_refused_before_anything_slow(monkeypatch):
    monkeypatch.setattr(limits, "resource", None)
    target = Target("local", memory_mb=10.0)
    with pytest.raises(InputError, match="without --memory-limit"):
        bench_on_target(None, None, target)
    with pytest.raises(InputError, match="without --memory-limit"):
        check_target(target, (1,))


def test_too_little_memory_is_said(own_kit):
    with pytest.raises(TargetError, match="not all models run in 10 MB"):
        measure_locally(own_kit, Limits(memory_mb=10))
    roomy, record = Limits(cores=(min(os.sched_getaffinity(0)),), memory_mb=4000), ProgressRecord()
    results = measure_locally(own_kit, roomy, progress=record)
    record.check_all_done("measure here")
    assert any("round 2 of 2" in note for note in record.notes)
    assert results["limits"]["memory_mb"] == 4000
    assert results["limits"]["memory_limit"] in ("cgroup", "RLIMIT_DATA")
    assert results["place"] == "local"


def test_the_table_of_threads_and_memory(own_kit):
    rewritten(own_kit, lambda facts: facts.update(models=facts["models"][:1]))
    record = ProgressRecord()
    table = matrix(read_kit(own_kit.folder), (1,), (10.0, 4000.0), record)
    record.check_all_done("threads × memory")
    assert record.works[0].steps == 3
    assert [(cell["memory_mb"], cell["runs"]) for cell in table["cells"]] == [(10.0, False), (4000.0, True)]
    assert table["cells"][1]["p50_ms"] > 0
    (least,) = table["least"]
    assert 10 < least["memory_mb"] < 4000
    command = [sys.executable, str(own_kit.folder / RUNNER), "--memory", "dense", "--threads", "1"]
    cores = (min(os.sched_getaffinity(0)),)  # as the table has it: libraries start a thread a core, each with a stack
    assert run_limited(command, Limits(cores, least["memory_mb"] * 1.1)).code == 0
    assert run_limited(command, Limits(cores, least["memory_mb"] * 0.8)).code != 0


def test_nothing_is_left_where_the_watcher_fails():
    def watch(line):
        assert line == "working"
        raise ArithmeticError("the display is gone")

    code = "import sys, time; print('working', file=sys.stderr, flush=True); time.sleep(60)"
    with pytest.raises(ArithmeticError, match="display"):
        run_limited([sys.executable, "-c", code], Limits(), watch)
    assert not [p for p in psutil.Process().children(recursive=True) if "time.sleep(60)" in " ".join(p.cmdline())]


# ---- the command line


def test_a_run_is_measured_here_and_by_a_kit(vit_folder, tmp_path, capsys):
    """``bench --target``, the report that shows it, and results read back."""
    output = tmp_path / "run"
    assert invoke("run", *vit_options(vit_folder), "-o", output) == 0
    assert invoke("bench", output, "--target", "local", "--pin-cores", "1", "--matrix", "4000") == 0
    assert "least MB" in capsys.readouterr().out
    results = json.loads((output / "targets" / "local.json").read_text())
    assert [row["model"] for row in results["cases"]] == ["dense", "compressed"]
    assert results["limits"]["cores"] == [min(os.sched_getaffinity(0))]
    assert "## Measured at local" in (output / "report" / "report.md").read_text()
    capsys.readouterr()
    assert invoke("bench", output, "--target", f"kit:{tmp_path / 'kit'}", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"kit": str(tmp_path / "kit")}
    assert run_kit(tmp_path / "kit", "--rounds", "1", "--out", str(tmp_path / "board.json")).returncode == 0
    assert invoke("report", output, "--target-results", tmp_path / "board.json") == 0
    assert "## Measured at board" in (output / "report" / "report.md").read_text()
    (tmp_path / "wrong.json").write_text("{}")
    assert invoke("report", output, "--target-results", tmp_path / "wrong.json") == 2
    assert invoke("bench", output, "--matrix", "64") == 2
    assert "--matrix needs --target" in capsys.readouterr().err
