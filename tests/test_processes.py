"""Several processes share out the work of one run: with the results of one process, and clear failures."""

import pytest
import torch
from shared_calibration import CASES, calibrated
from teams import run_team

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
