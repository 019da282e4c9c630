"""The stages that train, from the command line: λ by trials, refinement kept or not, objectives by measurement."""

import json
import math

import pytest
from runs import stage_folder
from test_pipeline import UNGUARDED, invoke, vit_options


def facts(output, stage):
    return json.loads((stage_folder(output, stage) / f"{stage}.json").read_text())


def test_lambda_is_found_by_trials_within_the_budget(vit_folder, tmp_path):
    options = ["--prehab-steps", "4", "--prehab-lambda", "auto", "--set", "prehab.trials=2", *UNGUARDED]
    assert invoke("prehab", *vit_options(vit_folder), "-o", tmp_path, *options) == 0
    result = facts(tmp_path, "prehab")
    assert len(result["strength_trials"]) == 2
    best = min(result["strength_trials"], key=lambda row: row["loss"])
    assert result["strength"] == pytest.approx(best["strength"])
    assert all(row["strength"] == result["strength"] for row in result["history"])


@pytest.mark.parametrize("value", ["-1", "some"])
def test_a_lambda_that_is_none_is_refused(vit_folder, tmp_path, value, capsys):
    assert invoke("prehab", *vit_options(vit_folder), "-o", tmp_path, f"--prehab-lambda={value}") == 2
    error = capsys.readouterr().err
    assert "strength" in error or "--prehab-lambda" in error


def test_refinement_is_reported_and_used(vit_folder, tmp_path):
    options = ["--ratio", "0.8", "--refine-steps", "6", "--refine-block-steps", "2", "--set", "refine.hidden_share=0.2"]
    assert invoke("run", *vit_options(vit_folder), "-o", tmp_path, *options) == 0
    result = facts(tmp_path, "refine")
    assert result["kept"] == (result["held_out_loss_after"] < result["held_out_loss_before"])
    assert len(result["history"]) == 6
    assert result["samples"] > 32  # of the calibration sample: it draws from all training inputs
    report = (tmp_path / "report" / "report.md").read_text()
    assert "## Refinement" in report
    verified = json.loads((stage_folder(tmp_path, "verify") / "verify.json").read_text())
    assert verified["compressed"]["reload"]["tensors"] > 0


@pytest.mark.slow
def test_objectives_by_measurement_are_in_the_report(vit_folder, tmp_path):
    assert invoke("run", *vit_options(vit_folder), "-o", tmp_path, "--objective", "auto", "--ratio", "0.7") == 0
    trials = facts(tmp_path, "truncate")["objective_trials"]
    assert {trial["objective"] for trial in trials} <= {"fisher", "activation"}
    assert sum(trial["layers"] for trial in trials) == len(facts(tmp_path, "truncate")["layers"])
    report = (tmp_path / "report" / "report.md").read_text()
    assert all(trial["kind"] in report for trial in trials)


@pytest.mark.parametrize(("steps", "rate", "better"), [(120, "3e-3", "prehab"), (3, "0.5", "dense")])
def test_what_was_cut_follows_the_better_of_the_models_before_and_after_prehab(
    vit_folder, tmp_path, steps, rate, better
):
    """The dense model has random weights: many steps teach it digits, a few that are too large only damage it."""
    prehab = ["--prehab-steps", steps, "--prehab-lr", rate, "--prehab-lambda", "0", "--set", "prehab.train.distill=0"]
    options = [*UNGUARDED, "--ratio", "0.3", "--refine-steps", "2", "--rehab-steps", "2"]
    assert invoke("rehab", *vit_options(vit_folder), "-o", tmp_path, *prehab, *options) == 0
    loss = facts(tmp_path, "prehab")["history"][-1]["dense_loss"]
    assert loss < math.log(10) - 0.2 if better == "prehab" else loss > math.log(10) + 0.2
    refined = facts(tmp_path, "refine")
    assert refined["teacher"] == facts(tmp_path, "rehab")["teacher"] == better
    # At so low a ratio the cut model is what prehab made: near to it, and far from a dense model unlike it.
    assert (refined["history"][0]["divergence"] < 1e-3) == (better == "prehab")
