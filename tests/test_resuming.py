"""A run that is killed in the midst of a walk over blocks goes on there, and ends in the same result."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_pipeline import QUICK, hashes, invoke

from prehab_export.cli.entry import main
from prehab_export.compression import drift
from prehab_export.compression.factor_files import FactorFiles
from prehab_export.compression.moment_files import MomentWriter

SCRIPT = Path(__file__).parent / "dying_walk.py"


@pytest.fixture(scope="module")
def arguments(llama_folder, prose):
    lengths = ["--set", "bench.sequence_lengths=8", "--set", "bench.new_tokens=4", "--sequence-length", "24"]
    return [llama_folder, "--task", "text-generation", "--data", prose, *lengths, *QUICK]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    assert invoke("truncate", *arguments, "-o", output) == 0
    assert not unfinished(output)
    return output


def unfinished(output):
    return list(output.glob("stages/*/unfinished-*"))


def killed(parts, arguments, output):
    words = [str(word) for word in ("truncate", *arguments, "-o", output)]
    dead = subprocess.run([sys.executable, SCRIPT, str(parts), *words], check=False, capture_output=True)
    assert dead.returncode == -9
    return output


@pytest.fixture(scope="module")
def killed_in_truncation(arguments, tmp_path_factory):
    return killed(5, arguments, tmp_path_factory.mktemp("killed") / "run")


@pytest.fixture
def output(killed_in_truncation, tmp_path):
    return shutil.copytree(killed_in_truncation, tmp_path / "run")


def goes_on(output, parts, stage, whole, arguments, monkeypatch):
    """Two blocks have six parts: their inputs, then their gradients, then their factors."""
    (left,) = unfinished(output)
    assert left.parent.name == stage
    written = []
    add, write = MomentWriter.add, FactorFiles.write
    monkeypatch.setattr(MomentWriter, "add", lambda *args: written.append("moments") or add(*args))
    monkeypatch.setattr(FactorFiles, "write", lambda *args: written.append("factors") or write(*args))
    assert invoke("truncate", *arguments, "-o", output) == 0
    assert len(written) == 6 - parts
    assert not unfinished(output)
    for done in ("calibrate", "truncate"):
        (mine,), (expected,) = (sorted((folder / "stages" / done).iterdir()) for folder in (output, whole))
        assert hashes(mine) == hashes(expected)


@pytest.mark.parametrize("parts", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_goes_on_at_the_block_of_calibration(parts, whole, arguments, tmp_path, monkeypatch):
    goes_on(killed(parts, arguments, tmp_path / "run"), parts, "calibrate", whole, arguments, monkeypatch)


def test_a_run_goes_on_at_the_block_of_truncation(output, whole, arguments, monkeypatch):
    goes_on(output, 5, "truncate", whole, arguments, monkeypatch)


def test_what_other_options_left_unfinished_is_removed(output, arguments):
    (left,) = unfinished(output)
    assert invoke("truncate", *arguments, "-o", output, "--ratio", "0.7") == 0
    assert not left.exists()


def test_clean_removes_what_is_unfinished(output):
    assert invoke("clean", output) == 0
    assert not unfinished(output)


def test_a_failure_leaves_nothing_unfinished(output, arguments, monkeypatch):
    def fails(*_args):
        raise ValueError("a bug")

    monkeypatch.setattr(drift, "_fit_block", fails)
    with pytest.raises(ValueError, match="a bug"):
        main([str(word) for word in ("truncate", *arguments, "-o", output)])
    assert not unfinished(output)
