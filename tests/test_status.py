"""What ``status`` tells of a run's folder: what is current, stale and missing, and why; without model or data."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_pipeline import QUICK, TEXT, hashes, invoke, vit_options

from prehab_export import status
from prehab_export.config.options import from_dict, read_options
from prehab_export.config.run import RunConfig
from prehab_export.pipeline.running import run_session
from prehab_export.pipeline.staleness import describe_difference
from prehab_export.pipeline.workspace import Workspace


@pytest.fixture(scope="module")
def exported(vit_folder, tmp_path_factory):
    """A run of a model of its own, as far as the graphs."""
    root = tmp_path_factory.mktemp("status")
    shutil.copytree(vit_folder, root / "model")
    assert invoke("export", *vit_options(root / "model"), "-o", root / "run") == 0
    return root


@pytest.fixture
def place(exported, tmp_path):
    """A copy of that run, which a test may spoil; model and options as they were when it was made."""
    shutil.copytree(exported / "run", tmp_path / "run")
    shutil.copytree(exported / "model", tmp_path / "model")
    for name in ("run.yaml", "manifests/source.json", "manifests/digests.json"):
        path = tmp_path / "run" / name
        path.write_text(path.read_text().replace(str(exported), str(tmp_path)))
    for path in (tmp_path / "run").glob("manifests/*/*.json"):
        path.write_text(path.read_text().replace(str(exported), str(tmp_path)))
    return tmp_path


def states(output: Path) -> dict[str, str]:
    return {row.stage: row.state for row in status(output).stages}


def reasons(output: Path, stage: str) -> list[str]:
    (row,) = (row for row in status(output).stages if row.stage == stage)
    return [*map(describe_difference, row.reasons.options), *row.reasons.others]


def edit(output: Path, before: str, after: str) -> None:
    """Change the saved options by hand."""
    text = (output / "run.yaml").read_text()
    assert before in text
    (output / "run.yaml").write_text(text.replace(before, after))


def test_what_is_there_is_current_and_the_rest_missing_or_not_wanted(place):
    found = states(place / "run")
    assert [stage for stage, state in found.items() if state == "current"] == [
        "calibrate",
        "truncate",
        "export",
        "baseline",
    ]
    assert {found[stage] for stage in ("verify", "artifact", "bench", "report")} == {"missing"}
    assert {found[stage] for stage in ("merge", "times", "prehab", "refine", "rehab", "quantize", "ort")} == {
        "not wanted"
    }
    rows = {row.stage: row for row in status(place / "run").stages}
    assert rows["calibrate"].made.endswith("+00:00")
    assert rows["calibrate"].seconds > 0
    assert rows["truncate"].bytes > 10_000
    assert status(place / "run").notes == ()


@pytest.mark.parametrize(
    ("before", "after", "difference", "first"),
    [
        ("ratio: 0.6", "ratio: 0.8", "truncate.ratio 0.6 → 0.8", "truncate"),
        ("samples: 32", "samples: 16", "calibrate.samples 32 → 16", "calibrate"),
        ("quantize: []", "quantize: [int4]", "quantize none → int4", "truncate"),  # which asks for whole blocks
        ("seed: 0", "seed: 1", "seed 0 → 1", "calibrate"),
        ("kv_cache: full", "kv_cache: full\nbogus: 1", None, None),
    ],
)
def test_an_option_that_was_edited_makes_stale_what_depends_on_it(before, after, difference, first, place, capsys):
    edit(place / "run", before, after)
    if difference is None:
        assert invoke("status", place / "run") == 2
        assert f"unknown option bogus in {place / 'run' / 'run.yaml'}" in capsys.readouterr().err
        return
    found = states(place / "run")
    order = ["calibrate", "truncate", "export"]
    for stage in order[order.index(first) :]:
        assert found[stage] == "stale"
        assert reasons(place / "run", stage) == [difference]
    assert all(found[stage] == "current" for stage in order[: order.index(first)])
    assert found["baseline"] == ("stale" if "seed" in difference else "current")


def test_what_a_verb_has_left_behind_names_the_option_that_differs(place, capsys):
    assert invoke("truncate", place / "run", "--ratio", "0.8") == 0
    found = states(place / "run")
    assert (found["truncate"], found["baseline"], found["export"]) == ("current", "current", "stale")
    assert reasons(place / "run", "export") == ["truncate.ratio 0.6 → 0.8"]
    assert [kept.stage for kept in status(place / "run").kept] == ["export", "truncate"]
    capsys.readouterr()
    assert invoke("status", place / "run") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "truncate.ratio 0.6 → 0.8" in told
    assert "prehab-export clean" in told
    assert "to see what an update would take" in told


def test_a_result_of_options_that_come_back_is_found_again(place):
    assert invoke("truncate", place / "run", "--ratio", "0.8") == 0
    edit(place / "run", "ratio: 0.8", "ratio: 0.6")
    assert {states(place / "run")[stage] for stage in ("calibrate", "truncate", "export", "baseline")} == {"current"}


def test_a_report_of_other_measurements_is_stale(place):
    """What only the last command could see."""
    workspace = Workspace.open_existing(place / "run")
    workspace.select("export", None)
    workspace.save_selection()
    assert reasons(place / "run", "export") == ["something else that it was made from has changed"]


def test_work_that_came_out_otherwise_is_named(place):
    workspace = Workspace.open_existing(place / "run")
    key = workspace.current["truncate"]
    manifest = workspace.manifest("truncate", key)
    manifest["files"]["truncate.json"]["sha256"] = "0" * 64
    workspace._write_manifest("truncate", key, manifest)
    assert states(place / "run")["truncate"] == "current"
    assert reasons(place / "run", "export") == ["truncate ran again with a different result"]


def test_a_changed_model_is_named_by_file(place):
    weights = place / "model" / "model.safetensors"
    facts = weights.stat()
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))  # touched, and the same
    assert states(place / "run")["calibrate"] == "current"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert reasons(place / "run", "calibrate") == ["the model changed: model.safetensors"]
    assert {states(place / "run")[stage] for stage in ("truncate", "export", "baseline")} == {"stale"}


def test_a_file_too_large_to_look_into_is_only_noted(place, monkeypatch):
    from prehab_export.pipeline import staleness

    monkeypatch.setattr(staleness, "HASH_LIMIT", 10)
    weights = place / "model" / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    found = status(place / "run")
    assert states(place / "run")["calibrate"] == "current"
    assert [note for note in found.notes if "was written since" in note] == [
        f"{weights} was written since it was last read; a run will read it"
    ]


def test_without_model_and_data_it_still_answers(place, capsys):
    shutil.rmtree(place / "model")
    assert invoke("status", place / "run") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"the model is gone: {place / 'model'}" in told
    assert states(place / "run")["truncate"] == "current"


def test_changed_data_is_named(bert_folder, reviews, tmp_path):
    data = tmp_path / "reviews.csv"
    shutil.copy(reviews, data)
    options = ["--task", "text-classification", "--data", data, *QUICK, *TEXT, "-o", tmp_path / "run"]
    assert invoke("calibrate", bert_folder, *options) == 0
    assert states(tmp_path / "run")["calibrate"] == "current"
    data.write_text(data.read_text() + "good film,positive\n")
    assert reasons(tmp_path / "run", "calibrate") == ["the data changed: reviews.csv"]
    assert invoke("calibrate", tmp_path / "run") == 0
    assert states(tmp_path / "run")["calibrate"] == "current"
    assert invoke("calibrate", tmp_path / "run", "--sequence-length", "8") == 0
    assert invoke("calibrate", tmp_path / "run", "--set", "data.sequence_length=6", "--set", "seed=3") == 0
    assert states(tmp_path / "run")["calibrate"] == "current"
    edit(tmp_path / "run", "sequence_length: 6", "sequence_length: 7")
    assert reasons(tmp_path / "run", "calibrate") == ["data.sequence_length 6 → 7"]


def test_results_of_another_version_and_damaged_ones_are_named(place):
    workspace = Workspace.open_existing(place / "run")
    key = workspace.current["truncate"]
    manifest = workspace.manifest("truncate", key)
    manifest["versions"]["prehab-export"] = "0.0.9"
    workspace._write_manifest("truncate", key, manifest)
    assert reasons(place / "run", "truncate") == ["made by version 0.0.9"]
    assert reasons(place / "run", "export") == ["truncate is stale"]
    (workspace.folder("calibrate") / "statistics" / "index.json").unlink()
    assert reasons(place / "run", "calibrate") == ["statistics/index.json is gone or damaged"]


def test_manifests_that_say_little_are_read_all_the_same(place):
    """Those of an earlier version know neither options nor parents."""
    for path in (place / "run").glob("manifests/*/*.json"):
        manifest = json.loads(path.read_text())
        for name in ("config", "read", "parents", "made", "seconds"):
            del manifest[name]
        path.write_text(json.dumps(manifest))
    (place / "run" / "manifests" / "source.json").unlink()
    assert states(place / "run")["truncate"] == "current"
    assert status(place / "run").stages[1].made is not None


def test_it_agrees_with_what_a_run_would_do(place):
    """What is told as current is what is found valid, under these options and under others."""
    for before, after in (
        ("ratio: 0.6", "ratio: 0.6"),
        ("samples: 32", "samples: 8"),
        ("dtype: auto", "dtype: float16"),
    ):
        edit(place / "run", before, after)
        told = {stage for stage, state in states(place / "run").items() if state == "current"}
        config = from_dict(RunConfig, read_options(place / "run" / "run.yaml"))
        with run_session(config, place / "run") as session:
            assert set(session.workspace.current) == told


def test_sweeps_targets_and_unfinished_work_are_told(place, capsys):
    assert invoke("sweep", place / "run", "--method", "fisher", "--ratio", "0.5") == 0
    (place / "run" / "targets").mkdir()
    device = {"cpu": "a board"}
    (place / "run" / "targets" / "board.json").write_text(json.dumps({"place": "board", "device": device}))
    (place / "run" / "stages" / "truncate" / "0123.partial").mkdir()
    found = status(place / "run")
    assert found.sweep == {"method": ["fisher"], "ratio": [0.5]}
    assert found.targets["board"]["cpu"] == "a board"
    assert found.notes == ("stages/truncate/0123.partial is unfinished: a command is running here, or was killed",)
    assert [kept.stage for kept in found.kept] == ["sweep"]
    capsys.readouterr()
    assert invoke("status", place / "run") == 0
    told = capsys.readouterr().out
    assert "sweep: fisher at 0.5" in told
    assert "board (a board)" in told


def test_it_is_told_to_programs_too(place, capsys):
    edit(place / "run", "ratio: 0.6", "ratio: 0.8")
    assert invoke("status", place / "run", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    rows = {row["stage"]: row for row in facts["stages"]}
    assert rows["truncate"]["reasons"]["options"] == [{"path": "truncate.ratio", "before": 0.6, "after": 0.8}]
    assert rows["merge"]["state"] == "not wanted"
    assert facts["task"] == "image-classification"


def test_it_changes_nothing_and_loads_nothing_heavy(place):
    before = hashes(place / "run")
    script = (
        "import sys\nfrom prehab_export.cli import main\n"
        f"try:\n    main(['status', {str(place / 'run')!r}])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'onnx', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hashes(place / "run") == before


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert invoke("status", tmp_path) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert invoke("status", tmp_path / "nowhere") == 2
    Workspace.open(tmp_path / "begun")
    assert invoke("status", tmp_path / "begun") == 2
    assert "that has begun" in capsys.readouterr().err
