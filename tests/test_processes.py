"""Several processes share out the work of one run: with the results of one process, and clear failures."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import shared_training
import torch
from runs import has_stage, stage_folder
from safetensors.torch import load_file
from shared_calibration import CASES, calibrated, factors_of
from teams import ROOT, run_team, start_team

from prehab_export.cli.entry import main
from prehab_export.compression.moment_files import load_statistics


@pytest.fixture(scope="module")
def calibrations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrations")
    run_team("shared_calibration.py", folder)
    return folder


def relative_error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("case", CASES)
def test_moments_of_two_processes_are_those_of_one(calibrations, case):
    expected = calibrated(case).statistics
    for name in ("0", "1", "written"):
        found = load_statistics(calibrations / f"{case}-{name}")
        assert found.groups == expected.groups
        assert found.units == expected.units or not expected.gradients
        assert found.gradients.keys() == expected.gradients.keys()
        for group, moment in expected.inputs.items():
            assert relative_error(found.inputs[group].second_moment, moment.second_moment) < 1e-7
            assert relative_error(found.inputs[group].mean, moment.mean) < 1e-7
            assert found.inputs[group].tokens == moment.tokens
            assert found.inputs[group].sampling.samples == moment.sampling.samples
            assert found.inputs[group].sampling.error == pytest.approx(moment.sampling.error, rel=1e-6, nan_ok=True)
        for layer, gradient in expected.gradients.items():
            assert relative_error(found.gradients[layer], gradient) < 1e-7


@pytest.mark.parametrize("case", [case for case in CASES if case != "gpt2-forward"])
def test_factors_of_two_processes_are_those_of_one(calibrations, case):
    expected = factors_of(calibrated(case))
    for rank in (0, 1):
        found = load_file(calibrations / f"{case}-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, product in expected.items():
            assert relative_error(found[name], product) < 1e-6


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainings")
    run_team("shared_training.py", folder)
    return folder


@pytest.mark.parametrize("case", shared_training.CASES)
def test_training_in_two_processes_takes_the_steps_of_one(trainings, case):
    model, rows = shared_training.trained(case)
    atol = 1e-5 if case == "refine" else 1e-8  # it compares hidden states in float32
    for rank in (0, 1):
        weights = load_file(trainings / f"{case}-{rank}.safetensors")
        assert weights.keys() == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-6, atol=atol)
        found = json.loads((trainings / f"{case}-{rank}.json").read_text())
        assert [row.keys() for row in found] == [row.keys() for row in rows]
        for row, expected in zip(found, rows, strict=True):
            assert {key: value for key, value in row.items() if key != "part"} == {
                key: pytest.approx(value, rel=1e-6) for key, value in expected.items() if key != "part"
            }


LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
LAUNCH += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
SMALL = ["--calibration-samples", "32", "--threads", "1", "--batch-size", "16"]


def training(model: Path, output: Path) -> list[str]:
    options = [str(model), "--task", "image-classification", "--data", "sklearn-digits", *SMALL, "-o", str(output)]
    steps = ["--prehab-steps", "2", "--refine-steps", "2", "--rehab-steps", "2"]
    return ["rehab", *options, *steps, "--set", "prehab.guard=false"]


@pytest.fixture(scope="module")
def killed(vit_folder, tmp_path_factory):
    """A run of which the second process was killed in truncation, and what both processes said and ended with."""
    output = tmp_path_factory.mktemp("runs") / "vit"
    script = [sys.executable, str(ROOT / "tests" / "dying_command.py"), "truncate", *training(vit_folder, output)]
    processes = start_team(script)
    texts = [process.communicate(timeout=300) for process in processes]
    return output, [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def test_a_killed_process_leaves_a_clear_failure_and_whole_results(killed):
    output, [(code, _, text), (other_code, _, other_text)] = killed
    assert other_code == -signal.SIGKILL
    assert code == 7
    assert text.strip().splitlines()[-1].startswith("error: another process of this run has ended")
    assert "Traceback" not in text
    assert has_stage(output, "prehab")
    assert not has_stage(output, "truncate")
    assert not list(output.rglob("*.partial"))
    assert not other_text.strip()


def test_the_next_launch_resumes_with_any_number_of_processes(killed, vit_folder, tmp_path):
    output, copy = killed[0], tmp_path / "copy"
    shutil.copytree(output, copy)
    launch = [sys.executable, *LAUNCH, "-m", "prehab_export", *training(vit_folder, output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    two = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert two.returncode == 0, two.stderr
    lines = two.stderr.splitlines()
    assert [lines.count(f"{stage}: up to date") for stage in ("calibrate", "prehab")] == [1, 1]
    assert [lines.count(stage) for stage in ("truncate", "refine", "rehab")] == [1, 1, 1]
    with pytest.raises(SystemExit, match="0"):
        main(training(vit_folder, copy))
    found, expected = (
        load_file(stage_folder(folder, "truncate") / "model" / "model.safetensors") for folder in (output, copy)
    )
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-6, atol=1e-6 * float(values.abs().max()))
