"""``--dense-graph``: when a run has a graph of the dense model, and a run without one."""

import collections
import json
from dataclasses import replace

import pytest
from runs import stage_folder
from test_memory_limits import CONFIG, llama_7b
from test_pipeline import invoke, vit_options

from prehab_export.config.options import from_dict, read_options
from prehab_export.config.run import RunConfig
from prehab_export.pipeline import dense_graph_choice
from prehab_export.pipeline.dense_graph_choice import lack_of_memory
from prehab_export.pipeline.memory import Memory
from prehab_export.pipeline.run_status import status
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.workspace import Workspace

NEVER = ["--dense-graph", "never"]
PLAIN_SVD = ["--objective", "weight", "--allocation", "uniform", "--no-drift-correction"]


def session_of(output) -> Session:
    config = from_dict(RunConfig, read_options(output / "run.yaml"))
    return Session(config, Workspace.open_existing(output))


def report_of(output) -> dict:
    return json.loads((output / "report" / "report.json").read_text())


@pytest.fixture(scope="module")
def without(vit_folder, tmp_path_factory):
    """A run without a dense graph, with int8 and .ort files."""
    output = tmp_path_factory.mktemp("runs") / "vit"
    options = [*vit_options(vit_folder), "-o", output, "--quantize", "int8", "--ort", *PLAIN_SVD, *NEVER]
    assert invoke("run", *options) == 0
    return output


def test_a_run_without_a_dense_graph_has_the_dense_metric_and_no_comparison(without, capsys):
    assert not list((without / "baseline").rglob("*.onnx"))
    assert not list((stage_folder(without, "quantize")).glob("dense*"))
    report, session = report_of(without), session_of(without)
    dense = report["verify"]["metrics"]["dense_pytorch"]
    expected = session.metrics(session.load_dense(), session.data.evaluation, "dense")
    assert dense["value"] == expected.value
    assert dense["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert report["baseline"]["missing_graph"] == "the options say --dense-graph never"
    assert "bytes" not in report["baseline"]
    assert {case["model"] for case in report["bench"]["cases"]} == {"compressed", "compressed int8"}
    assert report["bench"]["comparison"] == []
    assert [(row["model"], row["mode"]) for row in report["quantize"]["graphs"]] == [("compressed", "int8")]
    assert (without / "artifact" / "onnx" / "model_int8.ort").is_file()


def test_report_card_and_terminal_say_that_there_is_no_dense_graph(without, capsys):
    report = " ".join((without / "report" / "report.md").read_text().split())
    assert "There is no dense graph to compare with: the options say --dense-graph never." in report
    assert "| ONNX file, float32 | no dense graph | " in report
    assert "but for the dense model, which ran in PyTorch" in report
    assert "the dense speed" not in report
    assert "| dense float32 |" not in report
    card = " ".join((without / "artifact" / "README.md").read_text().split())
    assert "there is no graph of it, because the options say --dense-graph never" in card
    assert "| accuracy and file, int8 | no dense graph | " in card
    assert invoke("run", without) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "no dense graph to compare with: the options say --dense-graph never" in out
    assert "ONNX file, MB no dense graph" in out
    assert "speedup" not in out
    assert invoke("run", without, "--dry-run") == 0
    assert "no dense graph is made" in " ".join(capsys.readouterr().out.split())


def test_a_kit_without_a_dense_graph_compares_nothing(without, capsys):
    assert invoke("bench", without, "--target", "local", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert {row["model"] for row in results["cases"]} == {"compressed", "compressed int8"}
    assert results["comparison"] == []
    assert invoke("bench", without, "--target", "local") == 0
    assert "no speedups: there is no dense graph to compare with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("run", ["--min-speedup", "1.1"], "--min-speedup compares with the dense graph"),
        ("run", ["--budget", "latency:0.5"], "--budget latency is a share of the dense model's time"),
        ("fit", ["--size", "1MB"], "a fit compares with the dense graph"),
    ],
)
def test_what_needs_the_dense_graph_is_refused_without_it(verb, options, message, vit_folder, tmp_path, capsys):
    assert invoke(verb, *vit_options(vit_folder)[:5], "-o", tmp_path / "run", *options, *NEVER) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "run").glob("stages/*"))


def test_auto_makes_the_graph_if_the_budget_or_else_the_machine_has_the_memory(monkeypatch):
    memory = Memory(CONFIG, llama_7b(), 0.6, half=True)
    needed = 2 * 4 * memory.workload.parameters  # a session, and the graph while it opens
    limited = replace(memory, config=replace(CONFIG, max_memory=f"{needed / 1e9:.0f}GB"))
    assert lack_of_memory(limited).cause == "memory"
    assert lack_of_memory(replace(memory, config=replace(CONFIG, max_memory=f"{1.5 * needed / 1e9:.0f}GB"))) is None
    monkeypatch.setattr(dense_graph_choice, "machine_memory", lambda: needed)
    assert lack_of_memory(memory) == lack_of_memory(limited)  # in the same words
    monkeypatch.setattr(dense_graph_choice, "machine_memory", lambda: 2 * needed)
    assert lack_of_memory(memory) is None
    # Without the graph, the weights are mapped and evaluated block by block.
    assert replace(memory, dense_graph=False).need("baseline").held < 0.1 * memory.need("baseline").held


def test_auto_leaves_the_graph_out_for_want_of_memory_and_always_makes_it(vit_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dense_graph_choice, "machine_memory", lambda: 10**6)
    output = tmp_path / "run"
    assert invoke("export", *vit_options(vit_folder), "-o", output, *PLAIN_SVD) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "warning: no dense graph, so no speedups over it: its export would take about" in error
    assert session_of(output).dense_graph is None
    states = {row.stage: row.state for row in status(output).stages}
    assert states["export"] == states["baseline"] == "current"
    assert invoke("bench", output, "--min-speedup", "1.1") == 2
    assert "--min-speedup compares with the dense graph, and there is none: its export" in capsys.readouterr().err
    assert invoke("fit", output, "--size", "1MB") == 2
    assert "a fit compares with the dense graph, and there is none: its export" in capsys.readouterr().err
    assert invoke("export", output, "--unset", "min-speedup", "--dense-graph", "always") == 0
    assert session_of(output).dense_graph is not None
    assert invoke("export", output, "--dense-graph", "never") == 0
    assert session_of(output).dense_graph is None
    assert invoke("export", output, "--dense-graph", "always") == 0  # found again
    assert "baseline: up to date" in capsys.readouterr().err


@pytest.mark.slow
def test_what_auto_chose_for_the_disk_stays(vit_folder, tmp_path, monkeypatch, capsys):
    small, output = tmp_path / "small", tmp_path / "run"
    usage = collections.namedtuple("usage", "total used free")
    chosen = {}

    def needed(session):  # more with the graph than without
        chosen[session.workspace.root.name] = session.missing_dense_graph
        return 2000 if session.missing_dense_graph is None else 1000

    for module in ("running", "dense_graph_choice"):
        monkeypatch.setattr(f"prehab_export.pipeline.{module}.disk_needed", needed)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage(3000, 0, free))
    free = 1500
    assert invoke("export", *vit_options(vit_folder), "-o", small, *PLAIN_SVD) == 0
    assert session_of(small).dense_graph is None
    free = 2500
    assert invoke("export", *vit_options(vit_folder), "-o", output, *PLAIN_SVD) == 0
    assert session_of(output).dense_graph is not None
    capsys.readouterr()
    assert invoke("export", small) == 0
    assert "baseline: up to date" in capsys.readouterr().err
    assert chosen["small"].cause == "disk"
    free = 2000  # what is needed is there
    assert invoke("export", output) == 0
    assert "baseline: up to date" in capsys.readouterr().err
    assert chosen["run"] is None
