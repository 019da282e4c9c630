"""Files and folders appear whole or not at all, and nothing unfinished outlives the process that made it for long."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from converters import owned_folders
from converters.owned_folders import OwnedFolder
from converters.publishing import PARTIAL, publish_text, published_files, published_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_there_when_it_is_finished(tmp_path):
    place = tmp_path / "new" / "place"
    with published_folder(place) as fresh:
        (fresh / "a").write_text("1")
        assert not place.exists()
        assert fresh.parent.parent == place.parent  # one file system
    assert names(place) == ["a"]
    assert names(place.parent) == ["place"]
    (tmp_path / "plain").mkdir()
    assert place.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("reason", [OSError("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("replace", [True, False])
def test_a_failure_leaves_what_was_there(tmp_path, reason, replace):
    place = tmp_path / "place"
    place.mkdir()
    if replace:
        (place / "old").write_text("old")
    before = names(place)

    def fails():
        with published_folder(place, replace=replace) as fresh:
            (fresh / "half").write_text("half")
            raise reason

    with pytest.raises(type(reason)):
        fails()
    assert names(place) == before
    assert names(tmp_path) == ["place"]


def test_only_what_may_be_replaced_is(tmp_path):
    place = tmp_path / "place"
    with published_folder(place) as fresh:
        (fresh / "a").write_text("1")
    with pytest.raises(OSError, match="not empty"), published_folder(place) as fresh:
        (fresh / "b").write_text("2")
    assert names(place) == ["a"]
    with published_folder(place, replace=True) as fresh:
        (fresh / "b").write_text("2")
    assert names(place) == ["b"]
    file = tmp_path / "file"
    file.write_text("a file")
    with published_folder(file, replace=True) as fresh:
        (fresh / "c").write_text("3")
    assert names(file) == ["c"]


def test_what_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    place, original = tmp_path / "place", os.replace
    with published_folder(place) as fresh:
        (fresh / "old").write_text("1")

    def replace(source, target):
        if source.name == "fresh":
            raise PermissionError("open elsewhere")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError), published_folder(place, replace=True):
        pass
    assert names(place) == ["old"]
    assert names(tmp_path) == ["place"]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis").write_text("years of work")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with published_folder(tmp_path / "link", replace=True):
        pass
    assert names(tmp_path / "theirs") == ["thesis"]
    assert not (tmp_path / "link").is_symlink()


def test_the_current_folder_may_be_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with published_folder(Path("place")) as fresh:
        (fresh / "a").write_text("1")
    with published_files(Path("b"), Path("c")) as fresh:
        (fresh / "c").write_text("2")
    assert names(tmp_path) == ["c", "place"]


def test_files_that_belong_together(tmp_path):
    data, graph = tmp_path / "data", tmp_path / "graph"
    with published_files(data, graph) as fresh:
        (fresh / "steps").mkdir()
        (fresh / "data").write_text("1")
        (fresh / "graph").write_text("1")
        assert names(tmp_path) == [fresh.parent.name]
    assert names(tmp_path) == ["data", "graph"]
    with pytest.raises(OSError, match="No such file"), published_files(data, graph) as fresh:
        (fresh / "none" / "graph").write_text("2")
    assert (data.read_text(), graph.read_text()) == ("1", "1")
    with published_files(data, graph) as fresh:
        (fresh / "graph").write_text("3")
    assert names(tmp_path) == ["graph"]  # the data of the earlier one would be nobody's
    assert graph.read_text() == "3"


@pytest.mark.parametrize("kept", ["a graph by itself", "a graph with data"])
def test_a_graph_never_stands_beside_data_of_another(tmp_path, monkeypatch, kept):
    """The process ends before any one of the moves."""
    data, graph = tmp_path / "data", tmp_path / "graph"
    original, seen = os.replace, set()
    for moves in range(3):
        graph.write_text("old")
        data.write_text("old") if kept.endswith("data") else data.unlink(missing_ok=True)
        left = iter(range(moves))

        def replace(source, target, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            original(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            with published_files(data, graph) as fresh:
                (fresh / "data").write_text("new")
                (fresh / "graph").write_text("new")
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
        seen.add(tuple(file.read_text() if file.exists() else None for file in (graph, data)))
    assert ("new", "new") in seen
    assert all(graph is None or graph == data for graph, data in seen)


def test_a_graph_by_itself_is_replaced_in_one_step(tmp_path, monkeypatch):
    graph = tmp_path / "graph"
    graph.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception), published_files(tmp_path / "data", graph) as fresh:
        (fresh / "graph").write_text("new")
    assert graph.read_text() == "old"


def test_text_is_all_of_it_or_what_was_there(tmp_path):
    place = tmp_path / "a.json"
    publish_text(place, "λ\n")
    assert place.read_bytes() == "λ\n".encode()
    (tmp_path / "plain").write_text("")
    assert place.stat().st_mode == (tmp_path / "plain").stat().st_mode
    os.link(place, tmp_path / "shown")
    with pytest.raises(UnicodeEncodeError):
        publish_text(place, "half\ud800")
    assert place.read_bytes() == "λ\n".encode()
    publish_text(place, "new")
    assert (tmp_path / "shown").read_bytes() == "λ\n".encode()  # another name of what was there keeps that
    assert names(tmp_path) == ["a.json", "plain", "shown"]
    with pytest.raises(OSError, match="No such file"):
        publish_text(tmp_path / "none" / "a.json", "text")


HOLDS = """
import sys, time
from pathlib import Path
from converters.publishing import published_folder
with published_folder(Path(sys.argv[1]), replace=True) as fresh:
    (fresh / "half").write_text("half")
    print("begun", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    place, strangers = tmp_path / "a[1]", tmp_path / f".a[1].notes{PARTIAL}"
    strangers.mkdir()  # without an owner's lock in it: nobody knows what it is
    started = [
        subprocess.Popen([sys.executable, "-c", HOLDS, place], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        assert [process.stdout.readline() for process in started] == ["begun\n"] * 2
        assert len(names(tmp_path)) == 3
        started[0].kill()
        started[0].wait()
        assert len(names(tmp_path)) == 3
        with published_folder(place) as fresh:
            (fresh / "whole").write_text("whole")
        assert names(place) == ["whole"]
        (living,) = set(tmp_path.iterdir()) - {place, strangers}
        assert (living / "fresh" / "half").is_file()
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()
    with published_folder(place, replace=True):
        pass
    assert set(tmp_path.iterdir()) == {place, strangers}


def test_a_folder_that_another_process_takes_away_is_another_ones(tmp_path, monkeypatch):
    """Between its making and the lock, another process may find a folder without an owner."""
    original, others = owned_folders._lock_in, []

    def another_is_first(folder):
        if not others:
            others.append(original(folder))
            others[0].acquire()
        return original(folder)

    monkeypatch.setattr(owned_folders, "_lock_in", another_is_first)
    folder = OwnedFolder.make(tmp_path, "a")
    assert others[0].lock_file != str(folder.path / owned_folders.LOCK)
    folder.remove()
    assert names(tmp_path) == [Path(others[0].lock_file).parent.name]
    others[0].release()
    OwnedFolder.make(tmp_path, "a").remove()
    assert names(tmp_path) == []


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("no locks here")

    monkeypatch.setattr(owned_folders.FileLock, "acquire", fails)
    with published_folder(tmp_path / "place") as fresh:
        (fresh / "a").write_text("1")
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == ["place"]


def test_a_fork_takes_nothing_away(tmp_path):
    folder = OwnedFolder.make(tmp_path, "a")
    child = os.fork()
    if not child:
        folder.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.path.is_dir()
    folder.remove()
    assert names(tmp_path) == []


def test_many_at_once(tmp_path):
    """Processes that write one place take turns in it without taking anything of each other's away."""
    code = """
import sys
from pathlib import Path
from converters.publishing import published_files, publish_text
for turn in range(40):
    with published_files(Path(sys.argv[1]) / "graph") as fresh:
        (fresh / "graph").write_text("x" * 1000)
    publish_text(Path(sys.argv[1]) / "text", "x" * 1000)
"""
    started = [subprocess.Popen([sys.executable, "-c", code, tmp_path]) for _ in range(4)]
    end = time.monotonic() + 60
    assert [process.wait(end - time.monotonic()) for process in started] == [0] * 4
    assert names(tmp_path) == ["graph", "text"]
    assert {len(file.read_text()) for file in tmp_path.iterdir()} == {1000}
