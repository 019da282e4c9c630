"""The sweep: what it measures is what a run would give, and only what is missing is computed."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from converters.errors import InputError
from prehab_export import sweep
from prehab_export.cli.commands import cli
from prehab_export.config.calibrate import CalibrateConfig
from prehab_export.config.data import DataConfig
from prehab_export.config.options import to_yaml
from prehab_export.config.run import RunConfig
from prehab_export.config.training import RefineConfig, RefineSchedule
from prehab_export.config.truncate import TruncateConfig
from prehab_export.pipeline.running import run


@pytest.fixture(scope="module")
def config(vit_folder):
    return RunConfig(
        str(vit_folder),
        "image-classification",
        DataConfig("sklearn-digits", eval_samples=60),
        calibrate=CalibrateConfig(samples=48),
        refine=RefineConfig(RefineSchedule(steps=3)),
    )


@pytest.fixture(scope="module")
def swept(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return sweep(config, folder, ["svd", "drift", "refined"], [0.8, 0.5])


def test_a_row_for_every_method_and_ratio_with_table_and_plot(swept):
    result = json.loads((swept / "sweep.json").read_text())
    assert [(row["method"], row["ratio"]) for row in result["rows"]] == [
        (method, ratio) for method in ("svd", "drift", "refined") for ratio in (0.5, 0.8)
    ]
    assert result["dense"]["ratio"] == 0.0
    table = (swept / "sweep.md").read_text()
    for row in result["rows"]:
        assert f"{row['value']:.4f}" in table
        assert row["selected_share_removed"] == pytest.approx(row["ratio"], abs=0.06)
    assert (swept / "sweep.png").stat().st_size > 1000


def test_a_second_call_computes_only_what_is_missing(config, swept):
    root = swept.parent
    rows = {path.parent.parent.name: path for path in root.glob("stages/sweep-*/*/row.json")}
    before = {name: path.stat().st_mtime_ns for name, path in rows.items()}
    rows["sweep-drift-0.5"].unlink()
    sweep(config, root, ["svd", "drift", "refined"], [0.5, 0.8, 0.9])
    after = {path.parent.parent.name: path.stat().st_mtime_ns for path in root.glob("stages/sweep-*/*/row.json")}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"sweep-drift-0.5", "sweep-svd-0.9", "sweep-drift-0.9", "sweep-refined-0.9"}
    assert len(json.loads((root / "sweep" / "sweep.json").read_text())["rows"]) == 9


def test_the_sweep_agrees_with_a_run(config, swept, tmp_path):
    row = next(
        row
        for row in json.loads((swept / "sweep.json").read_text())["rows"]
        if (row["method"], row["ratio"]) == ("drift", 0.8)
    )
    alone = replace(config, truncate=TruncateConfig(ratio=0.8), refine=RefineConfig())
    workspace = run(alone, tmp_path / "run", until="artifact")
    metrics = workspace.read_json("verify", "verify.json")["metrics"]["compressed_onnx"]
    assert metrics["loss"] == pytest.approx(row["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_sweep_leaves_the_run_beside_it_as_it_is(config, tmp_path):
    """Options, what is shown, and what the next verb finds: a sweep goes through ratios of its own."""
    mine = replace(config, truncate=TruncateConfig(ratio=0.7, objective="activation"), refine=RefineConfig())
    run(mine, tmp_path, until="artifact")
    saved, card = (tmp_path / "run.yaml").read_text(), (tmp_path / "artifact" / "README.md").read_text()
    current = (tmp_path / "manifests" / "current.json").read_text()
    sweep(replace(mine, calibrate=CalibrateConfig(samples=32)), tmp_path, ["svd", "fisher"], [0.5])
    assert (tmp_path / "run.yaml").read_text() == saved
    assert (tmp_path / "manifests" / "current.json").read_text() == current
    assert (tmp_path / "artifact" / "README.md").read_text() == card
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("manifests/*/*.json")}
    run(mine, tmp_path, until="artifact")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("manifests/*/*.json")} == before


def test_a_sweep_in_a_new_folder_saves_what_was_asked_for(config, tmp_path):
    sweep(config, tmp_path, ["svd"], [0.5])
    assert (tmp_path / "run.yaml").read_text() == to_yaml(config)


def test_wrong_input(config, tmp_path):
    with pytest.raises(InputError, match="refine-steps"):
        sweep(replace(config, refine=RefineConfig()), tmp_path / "a", ["refined"], [0.5])
    with pytest.raises(InputError, match="ratio"):
        sweep(config, tmp_path / "b", ["svd"], [1.5])
    result = CliRunner().invoke(cli, ["sweep", config.model, "--method", "magic", "-o", str(tmp_path / "c")])
    assert result.exit_code == 2
    assert "svd-llm" in result.output
