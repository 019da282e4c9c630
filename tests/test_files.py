"""The files of a run, and where things are kept from one run to the next."""

import os
import sys
from pathlib import Path

import platformdirs.macos
import platformdirs.windows
import pytest

from prehab_export.system import files
from prehab_export.system.errors import StorageError
from prehab_export.system.files import cache_folder, link, replacing


@pytest.mark.skipif(sys.platform != "linux", reason="what XDG says holds on Linux")
@pytest.mark.parametrize("given", [None, "", "relative", "~/cache"])
def test_a_cache_folder_counts_if_it_is_absolute(given, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert cache_folder() == tmp_path / "there" / "prehab-export"
    monkeypatch.setenv("XDG_CACHE_HOME", given) if given is not None else monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "prehab-export"


def test_other_systems_have_their_own_places(monkeypatch):
    """The answers of the library for them, asked here with what `cache_folder` asks with."""
    asked = []
    monkeypatch.setattr(files, "user_cache_path", lambda *names, **options: asked.append((names, options)) or Path())
    cache_folder()
    ((names, options),) = asked
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert platformdirs.macos.MacOS(*names, **options).user_cache_dir.endswith("/Library/Caches/prehab-export")
    monkeypatch.setattr(platformdirs.windows, "get_win_folder", lambda _name: "LOCAL")
    assert Path(platformdirs.windows.Windows(*names, **options).user_cache_dir) == Path("LOCAL/prehab-export/Cache")


def test_a_link_is_a_second_name_of_the_file_behind_it_but_not_of_external_weights(tmp_path):
    (tmp_path / "file").write_text("1")
    (tmp_path / "file.onnx_data").write_text("2")
    (tmp_path / "symbolic").symlink_to(tmp_path / "file")
    link(str(tmp_path / "symbolic"), str(tmp_path / "shown"))
    link(str(tmp_path / "file.onnx_data"), str(tmp_path / "shown.onnx_data"))
    assert not (tmp_path / "shown").is_symlink()
    assert os.path.samefile(tmp_path / "shown", tmp_path / "file")
    assert not os.path.samefile(tmp_path / "shown.onnx_data", tmp_path / "file.onnx_data")


def test_a_folder_that_finds_no_room_is_told_in_a_sentence(tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "old").write_text("old")
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="nothing half-written is left"), replacing(tmp_path / "place") as fresh:
        (fresh.parents[1] / "full").write_text("half")
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "place"]
