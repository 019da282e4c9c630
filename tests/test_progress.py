"""The one protocol of progress: what is told, and what a person sees of it."""

import io

import pytest
from progress_record import ProgressRecord

from prehab_export.measurement.targets.rounds import follow
from prehab_export.system import terminal
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


@pytest.mark.parametrize(("steps", "line"), [(3, "  bench: 1 of 3 memory of [m]\n"), (0, "  bench: 1 memory of [m]\n")])
def test_lines_where_there_is_no_terminal(monkeypatch, capsys, steps, line):
    """Not each step: one line in a while."""
    now = iter([0.0, 16.0, 16.0, 17.0, 18.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(now))
    with bar("bench", steps) as advance:
        advance(1, "memory of [m]")
        advance()
    assert capsys.readouterr().err == line
