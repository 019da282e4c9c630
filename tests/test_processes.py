"""Several processes share out the work of one run: with the results of one process, and clear failures."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import shared_training
import torch
from runs import has_stage, stage_folder
from safetensors.torch import load_file
from shared_calibration import CASES, calibrated
from teams import ROOT, run_team, start_team

from prehab_export.cli.entry import main
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.moment_files import load_statistics
from prehab_export.compression.truncation import truncate
from prehab_export.config.truncate import TruncateConfig


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


@pytest.mark.parametrize("case", ["llama", "vit"])
def test_factors_of_two_processes_are_those_of_one(calibrations, case):
    one = calibrated(case)
    two = Calibrated(one.model, one.task, load_statistics(calibrations / f"{case}-written"))
    expected, found = (truncate(each, TruncateConfig(ratio=0.5)) for each in (one, two))
    assert expected.factors.keys() == found.factors.keys()
    for name, pair in expected.factors.items():
        assert relative_error(found.factors[name].up @ found.factors[name].down, pair.up @ pair.down) < 1e-6
        assert torch.allclose(found.factors[name].up, pair.up, rtol=1e-5, atol=1e-6 * float(pair.up.abs().max()))


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


def truncation(model: Path, output: Path) -> list[str]:
    options = [str(model), "--task", "image-classification", "--data", "sklearn-digits", *SMALL, "-o", str(output)]
    return ["truncate", *options, "--prehab-steps", "2", "--set", "prehab.guard=false"]


@pytest.fixture(scope="module")
def killed(vit_folder, tmp_path_factory):
    """A run of which the second process was killed in prehab, and what both processes said and ended with."""
    output = tmp_path_factory.mktemp("runs") / "vit"
    script = [sys.executable, str(ROOT / "tests" / "dying_command.py"), "prehab", *truncation(vit_folder, output)]
    processes = start_team(script)
    texts = [process.communicate(timeout=300) for process in processes]
    return output, [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def test_a_killed_process_leaves_a_clear_failure_and_whole_results(killed):
    output, [(code, _, text), (other_code, _, other_text)] = killed
    assert other_code == -signal.SIGKILL
    assert code == 7
    assert text.strip().splitlines()[-1].startswith("error: another process of this run has ended")
    assert "Traceback" not in text
    assert has_stage(output, "calibrate")
    assert not has_stage(output, "prehab")
    assert not list(output.rglob("*.partial"))
    assert not other_text.strip()


def test_the_next_launch_resumes_and_gives_what_one_process_gives(killed, vit_folder, tmp_path):
    output, _ = killed
    before = (stage_folder(output, "calibrate") / "calibrate.json").stat().st_mtime_ns
    launch = [sys.executable, *LAUNCH, "-m", "prehab_export", *truncation(vit_folder, output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    resumed = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert resumed.returncode == 0, resumed.stderr
    lines = resumed.stderr.splitlines()
    assert lines.count("calibrate: up to date") == lines.count("prehab") == lines.count("truncate") == 1
    assert (stage_folder(output, "calibrate") / "calibrate.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="0"):
        main(truncation(vit_folder, tmp_path / "one"))
    moments = [stage_folder(folder, "calibrate") / "statistics" for folder in (output, tmp_path / "one")]
    for file in sorted(moments[0].glob("*.safetensors")):
        one = load_file(moments[1] / file.name)
        for name, values in load_file(file).items():
            assert relative_error(values, one[name]) < 1e-6
    histories = [
        json.loads((stage_folder(folder, "prehab") / "prehab.json").read_text())["history"]
        for folder in (output, tmp_path / "one")
    ]
    for found, expected in zip(*histories, strict=True):
        assert found == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}
