"""Names that look like markup: on the terminal and in reports they are names."""

import csv
import io
import json
import shutil

import jinja2
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import nodes
from markdown_it import MarkdownIt
from rich.console import Console
from test_bench import QUICK as QUICK_BENCH
from test_bench import vision
from test_pipeline import QUICK, invoke

from prehab_export.cli.tables.bench import format_bench
from prehab_export.cli.tables.fit import print_fit
from prehab_export.cli.tables.sweep import print_sweep
from prehab_export.cli.tables.target import print_results
from prehab_export.config.bench import BenchConfig
from prehab_export.measurement import benchmark
from prehab_export.measurement.benchmark import bench
from prehab_export.measurement.roofline import Ceilings
from prehab_export.measurement.targets.kit import make_kit
from prehab_export.pipeline.fitting.report import FIT_HEADINGS, fit_rows
from prehab_export.system import terminal as progress
from prehab_export.system.rendering import code_span, escape_markdown, render
from prehab_export.system.terminal import bar, result_console, say, warn

NAME = "x[/v2]|*a*:smile:"
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def shown(markdown: str) -> list[str]:
    """The text of every paragraph, heading and cell, as a reader sees it; anything but text is named instead."""
    inlines = [token for token in PARSER.parse(markdown) if token.type == "inline"]
    return ["".join(child.content if child.type in ("text", "code_inline") else f"<{child.type}>"
                    for child in inline.children) for inline in inlines]  # fmt: skip


TEXTS = st.text(st.sampled_from("ab1 _*`[]()<>|~#$&;\\-+=.!:/\n\té")) | st.text()


@given(TEXTS)
@example(NAME)
@example("1. first")
@example("- item")
@example("---")
@example("_a_ __b__ &amp; ![x](y) <b>")
def test_escaped_text_is_read_as_it_was(text):
    line = " ".join(progress.printable(text.encode("utf-8", "backslashreplace").decode()).split())
    escaped = escape_markdown(text)
    if not line:
        return
    assert shown(escaped) == [line]
    assert shown(f"# {escaped}") == [line]
    assert shown(f"- {escaped}") == [line]
    assert shown(f"| a | b |\n|---|---|\n| {escaped} | {escaped} |\n") == ["a", "b", line, line]


@given(TEXTS)
def test_code_spans_hold_what_they_are_given(text):
    line = " ".join(progress.printable(text.encode("utf-8", "backslashreplace").decode()).split())
    if not line:
        return
    assert shown(f"| a | b |\n|---|---|\n| {code_span(text)} | 1 |\n")[2] == line


@pytest.fixture
def named(vit_folder, tmp_path, monkeypatch):
    """A model in a folder of such a name, which holds a slash as well."""
    folder = tmp_path / NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(vit_folder, folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_inspect(named, capsys):
    assert invoke("inspect", named) == 0
    assert NAME.rsplit("/")[-1] in capsys.readouterr().out


def test_errors(tmp_path, capsys):
    assert invoke("inspect", tmp_path / NAME) == 2
    assert "v2]|*a*" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_run(bert_folder, reviews, tmp_path, capsys, monkeypatch):
    """Model, data and output of such a name; the report's tables and headings are whole, its card has the name."""
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda threads, *_: Ceilings(threads, 1.0, 1.0, 1.0))
    shutil.copytree(bert_folder, tmp_path / NAME)
    data = tmp_path / "d|a" / "t`a:smile:.csv"
    data.parent.mkdir()
    with reviews.open() as source, data.open("w", newline="") as target:
        rows = [[text, f"[/{label}]|"] for text, label in list(csv.reader(source))[1:]]
        csv.writer(target).writerows([["text", "label"], *rows])
    model = json.loads((tmp_path / NAME / "config.json").read_text())
    names = ["[/negative]|", "[/positive]|"]
    model |= {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}
    (tmp_path / NAME / "config.json").write_text(json.dumps(model))
    output = tmp_path / "[/o|ut]"
    options = ["--task", "text-classification", "--data", data, "--bench-length", "8", *QUICK]
    assert invoke("run", tmp_path / NAME, *options, "-o", output) == 0
    told = capsys.readouterr()
    assert f"artifact  {output / 'artifact'}" in told.out
    seen = shown((output / "report" / "report.md").read_text())
    assert any(text.startswith("v2]|*a*:smile:: ") for text in seen)
    assert any("on t`a:smile:.csv;" in text for text in seen)
    assert any("v2]|*a*" in text for text in shown((output / "artifact" / "README.md").read_text()))


def facts_of_card(model: str) -> dict:
    metrics = {"value": 0.5, "loss": 1.0, "samples": 3}
    return {
        "model": model,
        "task": "text-classification",
        "data": "a|b",
        "metric": {"name": "accuracy"},
        "truncate": {"selected_share_removed": 0.5, "layers_factored": 2, "layers_dense": 0}
        | {f"{kind}_parameters_{when}": 9 for kind in ("selected", "total") for when in ("before", "after")},
        "verify": {
            "metrics": {f"{a}_{b}": metrics for a in ("dense", "compressed") for b in ("pytorch", "onnx")},
            "compressed": {"onnx": {"max_relative": 1e-6}},
        },
        "baseline": {"bytes": 1, "weight_bytes": 1, "dtype": "float32"},
        "export": {"bytes": 1, "weight_bytes": 1, "dtype": "float32"},
        "evaluation": {"window_start": None},
        "calibrate": {"samples": 1},
        "config": {
            "seed": 0,
            "adapter": None,
            "quantize": [],
            "truncate": {"budget": "parameters", "ratio": 0.5, "objective": "a", "allocation": "b",
                         "drift_correction": True},
        },
    }  # fmt: skip


@pytest.mark.parametrize("model", ["who/what", 'who/"x: #y\n[a]', "who/- a: b"])
def test_the_front_matter_of_a_card_is_yaml(model):
    card = render("pipeline", "card.md.j2", facts_of_card(model))
    assert yaml.safe_load(card.split("---")[1])["base_model"] == model


def test_a_device_of_such_a_name(capsys):
    device = {"cpu": NAME, "runtime": "[red]", "runtime_version": "1\x1b[31m"}
    row = {"model": NAME, "case": "[/b]", "threads": 1, "p50_ms": 1.0, "p95_ms": 1.0}
    least = {"model": NAME, "threads": 1, "memory_mb": 3.0}
    cells = [{"model": NAME, "threads": 1, "memory_mb": 9.0, "runs": True, "p50_ms": 1.0}]
    matrix = {"cells": cells, "least": [least], "memory_limit": "[/x]"}
    results = {"device": device, "place": NAME, "cases": [row], "comparison": [], "drift": [], "matrix": matrix}
    print_results(results)
    told = capsys.readouterr().out
    assert told.count(NAME) == 4
    assert "[/b]" in told
    assert "[/x]" in told
    assert "\x1b" not in told


def fit_result() -> dict:
    figures = {"p50_ms": 1.0, "p95_ms": 2.0, "memory_mb": 3.0, "size_mb": 4.0, "drop": 0.1}
    row = {"name": NAME, "measured": figures, "predicted": figures, "predicted_drop": 0.1, "pareto": True}
    budget = {"p95_ms": 3.0, "memory_mb": None, "size_mb": None, "max_drop": None}
    metric = {"metric": "accuracy", "value": 0.5, "samples": 3}
    device = {"cpu": NAME, "cores": 1, "os": "<b>", "runtime_version": "1"}
    coverage = {"selected_share": 0.6}
    return {"candidates": [row | {"recommended": True}], "coverage": coverage, "budget": budget,
            "metric": metric, "verdict": f"{NAME} fits.", "warning": "[/w]|", "model": NAME, "target": "ssh://[/h]",
            "device": device}  # fmt: skip


def test_a_fit(capsys, tmp_path):
    result = fit_result()
    print_fit(result, tmp_path / NAME)
    told = capsys.readouterr().out
    assert told.count(NAME) == 3
    assert "warning: [/w]|" in told
    seen = shown(render("pipeline", "fit.md.j2", result | {"headings": FIT_HEADINGS, "rows": fit_rows(result)}))
    assert seen[0] == f"{NAME}, fitted to ssh://[/h]"
    assert NAME in seen
    assert any(text.endswith("[/w]|<strong_close>") for text in seen)
    assert any(f"{NAME}, 1 cores, <b>," in text for text in seen)


def test_a_sweep(capsys):
    rows = [{"method": NAME, "ratio": 0.5, "value": 1.0}]
    print_sweep({"metric": "[/m]", "value": 1.0}, rows)
    told = capsys.readouterr().out
    assert NAME in told
    assert "[/m]" in told


def test_a_bench_and_a_kit(tmp_path, capsys):
    path = vision(tmp_path / NAME.replace("/", "") / "m.onnx")
    result = bench({NAME: path}, BenchConfig(**QUICK_BENCH))
    result_console().print(format_bench(result | {"machine": {"cpu": NAME}}))
    assert capsys.readouterr().out.count(NAME) == 2
    kit = make_kit({NAME: path}, tmp_path / "kit", BenchConfig(**QUICK_BENCH))
    assert any(NAME in text for text in shown((kit.folder / "README.md").read_text()))


def test_lines_and_bars(capsys, monkeypatch):
    """Also on a terminal, where a bar is drawn."""
    terminal = io.StringIO()
    say(NAME)
    warn(NAME)
    assert capsys.readouterr().err.splitlines() == [NAME, f"  warning: {NAME}"]
    live = type(progress.console)(file=terminal, force_terminal=True, width=120)
    assert isinstance(live, Console)
    monkeypatch.setattr(progress, "console", live)
    with bar(NAME, 2) as advance:
        advance(1, note="[/n]")
    assert NAME in terminal.getvalue()
    assert "[/n]" in terminal.getvalue()


@pytest.mark.parametrize("template", ["card.md.j2", "fit.md.j2", "kit.md.j2", "merged.md.j2", "report.md.j2"])
def test_spaces_of_a_template_stand_in_its_text(template):
    """What an expression gives is stripped, as a name is: a separator written as one would lose its space."""
    rooms = [jinja2.PackageLoader(f"prehab_export.{room}") for room in ("measurement", "pipeline")]
    environment = jinja2.Environment(loader=jinja2.ChoiceLoader(rooms))
    source = environment.loader.get_source(environment, template)[0]
    tree = environment.parse(source.replace("| metric", "").replace("| count", ""))
    given = [part for output in tree.find_all(nodes.Output) for part in output.nodes]
    while branches := [part for part in given if isinstance(part, nodes.CondExpr)]:
        given = [part for part in given if part not in branches]
        given += [part for branch in branches for part in (branch.expr1, branch.expr2) if part is not None]
    constants = [part.value for part in given if isinstance(part, nodes.Const)]
    assert [text for text in constants if str(text) != str(text).strip()] == []


def test_a_list_in_a_report_has_spaces():
    graphs = [{"mode": mode, "value": 0.5, "bytes": 1.0, "refit": {"kept": True}} for mode in ("int8", "int4")]
    pairs = [graph | {"model": model} for graph in graphs for model in ("dense", "compressed")]
    facts = facts_of_card("m") | {"quantize": {"graphs": pairs}}
    facts |= {"ort": {"files": [{"file": "model.ort"}, {"file": "model_int8.ort"}]}}
    facts |= {"prehab": {"strength": 1.0, "kept": False}}
    facts["config"] |= {"prehab": {"train": {"steps": 3}, "surrogate": "tail"}, "quantize": ["int8", "int4"]}
    facts["config"] |= {"adapter": "my *lora*"}
    card = render("pipeline", "card.md.j2", facts)
    assert r"The adapter **my \*lora\*** is merged into this model" in card
    assert "`onnx/model.ort`, `onnx/model_int8.ort`" in card
    assert "λ = 1.0 (did not help; not used)" in card
    assert "that it needs.\nThe factors in" in card
