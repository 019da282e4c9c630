"""What the README shows runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

import prehab_export as px

README = Path(__file__).resolve().parents[1] / "README.md"


def python_examples():
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_example_runs(bert_folder, tmp_path, monkeypatch):
    rows = [f"{'good' if label else 'bad'} film {number},{label}" for number, label in enumerate([0, 1] * 450)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    (tmp_path / "my-bert").symlink_to(bert_folder)
    monkeypatch.chdir(tmp_path)
    (example,) = python_examples()
    seen = {}
    exec(compile(example, "README.md", "exec"), seen)  # the README's own code
    judging, calibration = (set(seen[name].rows.tolist()) for name in ("judging", "calibration"))
    assert judging
    assert calibration
    assert not judging & calibration
    assert 0 <= seen["accuracy"] <= 1
    assert seen["compression"].truncation.ranks
    assert next(seen["again"].parameters()).dtype == torch.bfloat16
    assert (tmp_path / "small-bert" / "onnx" / "model.onnx").is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"px\.(\w+)", README.read_text(encoding="utf-8")))))
def test_names_that_the_readme_uses_are_public(name):
    assert name in px.__all__
