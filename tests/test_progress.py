"""The one protocol of progress: what is told, and what a person sees of it."""

import io

import pytest
from progress_record import ProgressRecord

from prehab_export.measurement.targets.rounds import follow
from prehab_export.system import digests, terminal
from prehab_export.system.progress import named, silent, step
from prehab_export.system.terminal import bar


def test_a_step_counts_once_it_is_done():
    record = ProgressRecord()
    with named(record, "a name of the caller's")("its own", 2) as advance:
        with step(advance, "first"):
            assert (record.works[0].done, record.works[0].notes) == (0, ["first"])
        with pytest.raises(ArithmeticError), step(advance, "second"):
            raise ArithmeticError
        assert record.works[0].done == 1
        advance()
    record.check_all_done("a name of the caller's")


def test_nobody_watches():
    with silent("work", 1) as advance, step(advance, "a note"):
        advance()


def test_lines_of_a_kit_count_its_rounds():
    record = ProgressRecord()
    with record("measure", 2) as advance:
        tell = follow(advance)
        for line in (
            "batch1: logits is off by 1e-7",
            "batch1, 2 thread(s): round 1 of 2",
            "batch1: round 2 of 2",
            "done",
        ):
            tell(line)
    record.check_all_done("measure")
    assert len(record.notes) == 4


@pytest.mark.parametrize("steps", [3, 0])
def test_a_bar_on_a_terminal(monkeypatch, steps):
    shown = io.StringIO()
    live = type(terminal.console)(file=shown, force_terminal=True, width=120)
    monkeypatch.setattr(terminal, "console", live)
    with bar("bench", steps) as advance, step(advance, "memory of [m]"):
        pass
    assert "bench" in shown.getvalue()
    assert "memory of [m]" in shown.getvalue()


def test_a_long_note_leaves_the_numbers_their_room(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "console", type(terminal.console)(file=shown, force_terminal=True, width=60))
    with bar("bench", 13) as advance, step(advance, "a note that is longer than any terminal is wide " * 9):
        pass
    assert " 1/13" in shown.getvalue()
    assert "0:00:00" in shown.getvalue()


def lines_of(capsys, monkeypatch, steps: int, times: list[float]) -> list[str]:
    """The lines of a work of which one step is done at each of these times."""
    now = iter([0.0, *times])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(now))
    with bar("bench", steps) as advance:
        for _ in times:
            advance(1, "memory of [m]")
    return capsys.readouterr().err.splitlines()


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    """Not each step: every tenth, with the time that is left at this pace."""
    lines = lines_of(capsys, monkeypatch, 40, [2.0 * step for step in range(1, 41)])
    assert len(lines) == 10
    assert lines[0] == "  bench: 4 of 40 (10%) after 8 s, about 72 s left memory of [m]"
    assert lines[-1] == "  bench: 40 of 40 (100%) after 80 s memory of [m]"


def test_lines_of_quick_and_of_slow_steps(monkeypatch, capsys):
    assert lines_of(capsys, monkeypatch, 10, [0.4 * step for step in range(1, 11)]) == []
    lines = lines_of(capsys, monkeypatch, 1000, [10.0 * step for step in range(1, 11)])
    assert [line.split(",")[0] for line in lines] == [
        "  bench: 3 of 1000 (0%) after 30 s",
        "  bench: 6 of 1000 (0%) after 60 s",
        "  bench: 9 of 1000 (0%) after 90 s",
    ]
    assert lines_of(capsys, monkeypatch, 0, [16.0, 32.0]) == ["  bench: 2 after 32 s memory of [m]"]


def test_a_large_file_is_read_with_progress(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights" * 100)
    expected, record = digests.sha256_of(path), ProgressRecord()
    monkeypatch.setattr(digests, "LARGE", 100)
    monkeypatch.setattr(digests, "STEP", 64)
    cache = digests.DigestCache(tmp_path / "cache.json", record)
    assert cache.sha256_of(path) == cache.sha256_of(path) == expected
    record.check_all_done("read model.safetensors, MiB")
