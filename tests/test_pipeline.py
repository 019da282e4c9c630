"""The whole way on tiny models, from the command line: results, resuming, kills, and refusals."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from conftest import word_tokenizer
from runs import has_stage, stage_folder
from tokenizers.processors import TemplateProcessing
from transformers import BartConfig, BartForSequenceClassification

from converters.folder import save_folder
from prehab_export import from_pretrained
from prehab_export.cli.entry import main
from prehab_export.config.options import from_dict
from prehab_export.config.run import RunConfig
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.workspace import Workspace
from prehab_export.system.rendering import render

QUICK = [
    "--calibration-samples",
    "32",
    "--threads",
    "1",
    "--set",
    "bench.rounds=1",
    "--eval-samples",
    "24",
    "--batch-size",
    "16",
]
UNGUARDED = ["--set", "prehab.guard=false"]
TRAINED = ["--prehab-steps", "4", "--rehab-steps", "4", "--set", "prehab.refresh_every=2", *UNGUARDED]
TEXT = ["--input-column", "what was said", "--set", "bench.sequence_lengths=8"]


def invoke(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def command(*arguments) -> list[str]:
    return [sys.executable, "-c", "from prehab_export.cli import main; main()", *map(str, arguments)]


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def vit_options(vit_folder):
    return [vit_folder, "--task", "image-classification", "--data", "sklearn-digits", *QUICK]


@pytest.fixture(scope="module")
def finished(vit_folder, tmp_path_factory):
    """A run of a ViT with all stages."""
    output = tmp_path_factory.mktemp("runs") / "vit"
    assert invoke("run", *vit_options(vit_folder), "-o", output, *TRAINED) == 0
    return output


def test_the_folder_has_the_promised_layout(finished):
    expected = ["config.json", "model.safetensors", "preprocessor_config.json", "onnx/model.onnx", "README.md"]
    assert all((finished / "artifact" / name).is_file() for name in expected)
    assert (finished / "baseline" / "onnx" / "model.onnx").is_file()
    assert (finished / "report" / "report.md").stat().st_size > 500
    assert (finished / "report" / "ranks.png").is_file()
    assert (finished / "report" / "prehab.png").is_file()
    assert not list(finished.rglob("*.partial"))
    here = str(finished.parent)
    for path in (finished / "artifact").rglob("*"):
        assert path.is_dir() or here.encode() not in path.read_bytes()


@pytest.mark.slow
def test_a_classifier_that_looks_for_the_end_of_a_text_goes_all_the_way(reviews, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64,
        d_model=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        eos_token_id=3,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        decoder_start_token_id=3,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    save_folder(BartForSequenceClassification(config), tmp_path / "bart", tokenizer)
    options = ["--task", "text-classification", "--data", reviews, *TEXT, *QUICK, "-o", tmp_path / "out"]
    assert invoke("run", tmp_path / "bart", *options) == 0


def test_the_report_says_what_it_cost(finished):
    report = json.loads((finished / "report" / "report.json").read_text())
    metrics = report["verify"]["metrics"]
    assert set(metrics) == {"dense_onnx", "compressed_onnx"}
    assert all(entry["samples"] == 24 and entry["metric"] == "accuracy" for entry in metrics.values())
    for name, folder in (("dense", None), ("compressed", finished / "artifact")):
        session = Session(
            from_dict(RunConfig, yaml.safe_load((finished / "run.yaml").read_text())), Workspace.open_existing(finished)
        )
        model = session.load_dense() if folder is None else from_pretrained(folder)
        in_pytorch = session.metrics(model, session.data.evaluation, name)
        assert metrics[f"{name}_onnx"]["loss"] == pytest.approx(in_pytorch.loss, rel=1e-4)
    assert report["truncate"]["selected_share_removed"] >= 0.6 - 1e-9
    assert report["verify"]["compressed"]["onnx"]["max_relative"] <= 1e-4
    history = report["prehab"]["history"]
    assert [row["step"] for row in history] == [0, 1, 2, 3]
    assert all({"task_loss", "surrogate", "strength"} <= set(row) for row in history)
    assert "dense_accuracy" in history[0]
    assert {case["model"] for case in report["bench"]["cases"]} == {"dense", "compressed"}


def test_the_artifact_computes_the_same_in_both_runtimes(finished):
    artifact = finished / "artifact"
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = from_pretrained(artifact)(pixel_values=pixels).logits.numpy()
    session = onnxruntime.InferenceSession(str(artifact / "onnx" / "model.onnx"))
    (actual,) = session.run(["logits"], {"pixel_values": pixels.numpy()})
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_a_second_run_does_nothing_and_a_changed_option_only_what_depends_on_it(vit_folder, tmp_path):
    output = tmp_path / "run"
    assert invoke("truncate", *vit_options(vit_folder), "-o", output) == 0
    before = made(output)
    assert [place.partition("/")[0] for place in before] == ["calibrate", "truncate"]
    assert invoke("truncate", output) == 0
    assert made(output) == before
    assert invoke("truncate", output, "--ratio", "0.8") == 0
    after = made(output)
    assert before.items() <= after.items()
    assert [place.partition("/")[0] for place in after] == ["calibrate", "truncate", "truncate"]
    assert removed_share(output) >= 0.8 - 1e-9
    assert invoke("truncate", output, "--ratio", "0.6") == 0  # found again, not made again
    assert made(output) == after
    assert removed_share(output) < 0.7


def made(output: Path) -> dict[str, int]:
    """When each result in a run's folder was made, by stage and key."""
    manifests = output / "manifests"
    return {p.relative_to(manifests).as_posix(): p.stat().st_mtime_ns for p in sorted(manifests.glob("*/*.json"))}


def removed_share(output: Path) -> float:
    return json.loads((stage_folder(output, "truncate") / "truncate.json").read_text())["selected_share_removed"]


def test_too_slow_is_a_failure_when_asked(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert invoke("bench", run, "--min-speedup", "0.001") == 0
    assert invoke("bench", run, "--min-speedup", "1000") == 4
    assert "less than --min-speedup 1000: compressed" in capsys.readouterr().err
    assert invoke("bench", run, "--min-speedup", "-1") == 2


def test_a_damaged_stage_is_done_again(vit_folder, tmp_path):
    output = tmp_path / "run"
    assert invoke("calibrate", *vit_options(vit_folder), "-o", output) == 0
    stage = stage_folder(output, "calibrate")
    part, whole = next(stage.glob("statistics/*.safetensors")), hashes(stage)
    part.write_bytes(part.read_bytes()[:-8])
    assert invoke("calibrate", output) == 0
    assert hashes(stage) == whole


def test_calibration_takes_no_more_samples_than_it_needs(vit_folder, tmp_path, capsys):
    output = tmp_path / "run"

    def samples():
        return json.loads((stage_folder(output, "calibrate") / "calibrate.json").read_text())["samples"]

    few = ["--calibration-samples", "200", "--set", "calibrate.enough=true"]
    assert invoke("truncate", *vit_options(vit_folder), *few, "-o", output) == 0
    needed = samples()
    assert 16 <= needed < 200
    assert f"{needed} of 200 calibration samples are enough" in capsys.readouterr().err
    assert invoke("calibrate", output, "--unset", "calibrate.enough") == 0
    assert samples() == 200


def test_text_classification(bert_folder, reviews, tmp_path, capsys):
    arguments = ["run", bert_folder, "--task", "text-classification", "--data", reviews, "-o", tmp_path / "run"]
    assert invoke(*arguments, *QUICK, *TEXT, "--ratio", "0.5", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verify"]["dense"]["onnx"]["max_relative"] <= 1e-4
    assert {case["sequence"] for case in report["bench"]["cases"]} == {8}
    assert (tmp_path / "run/artifact/tokenizer.json").is_file()


def test_text_generation(llama_folder, prose, tmp_path, capsys):
    arguments = ["run", llama_folder, "--task", "text-generation", "--data", prose, "-o", tmp_path / "run"]
    more = [
        "--sequence-length",
        "24",
        "--bench-length",
        "8",
        "--new-tokens",
        "4",
        "--rehab-steps",
        "2",
        "--rehab-method",
        "lora",
    ]
    assert invoke(*arguments, *QUICK, *more, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verify"]["compressed"]["onnx"]["greedy_tokens_identical"] is True
    assert report["verify"]["metrics"]["compressed_onnx"]["metric"] == "perplexity"
    assert [part["part"] for part in report["rehab"]["parts"]] == ["truncated", "up", "down"]
    assert report["bench"]["cases"][0]["tokens_per_s"] > 0
    assert_genai_generates(tmp_path / "run" / "artifact")
    # What windows of text start with is said wherever a figure is.
    assert report["evaluation"]["window_start"] == []
    for place in ("report/report.md", "artifact/README.md"):
        assert "The samples are windows of 24 tokens without a start token." in (tmp_path / "run" / place).read_text()
    report["evaluation"]["window_start"] = ["<s>"]
    for template in ("report.md.j2", "card.md.j2"):
        assert "The samples are windows of 24 tokens, each starting with `<s>`." in render("pipeline", template, report)


@pytest.mark.slow
def test_a_cache_of_latents(llama_folder, prose, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    arguments = ["--data", prose, "--kv-cache", "latent", "--quantize", "int8", "--json"]
    sizes = ["--sequence-length", "24", "--bench-length", "8", "--new-tokens", "4"]
    task = ["--task", "text-generation", "-o", tmp_path / "run"]
    assert invoke("run", llama_folder, *task, *QUICK, *sizes, *arguments) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["verify"]["compressed"]["onnx"]["greedy_tokens_identical"] is True
    assert report["export"]["cache_bytes_per_token"] < report["baseline"]["cache_bytes_per_token"]
    assert "cache, kB per token" in (tmp_path / "run/report/report.md").read_text()
    assert not (tmp_path / "run/artifact/genai_config.json").exists()
    assert "onnxruntime-genai does not support this kind of cache" in captured.err
    task = ["--task", "text-classification", "-o", tmp_path / "other"]
    assert invoke("run", llama_folder, *task, "--kv-cache", "latent", "--data", prose) == 2
    assert "has no cache" in capsys.readouterr().err
    config = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(llama_folder), config).save_pretrained(tmp_path / "lora")
    assert invoke("merge-lora", tmp_path / "run", tmp_path / "lora", "-o", tmp_path / "merged", "--threads", 1) == 0
    graphs = [onnxruntime.InferenceSession(tmp_path / part / "onnx/model.onnx") for part in ("run/artifact", "merged")]
    names, merged = ([node.name for node in graph.get_inputs()] for graph in graphs)
    assert names == merged
    assert any(name.endswith("latent") for name in names)


def assert_genai_generates(artifact):
    """onnxruntime-genai, from the folder as it stands, makes the tokens that PyTorch makes."""
    genai = pytest.importorskip("onnxruntime_genai")
    prompt = [5, 9, 12, 7]
    model = genai.Model(str(artifact))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 12)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    with torch.no_grad():
        expected = from_pretrained(artifact).generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert [int(token) for token in generator.get_sequence(0)] == expected[0].tolist()


@pytest.mark.slow
def test_a_decoder_that_counts_positions_from_the_left(gpt2_folder, prose, tmp_path, capsys):
    """GPT-2: Conv1D layers, learned positions (so that padding must be told apart), a position table of 64."""
    arguments = ["run", gpt2_folder, "--task", "text-generation", "--data", prose, "-o", tmp_path / "run"]
    assert invoke(*arguments, *QUICK, "--sequence-length", "24", "--new-tokens", "4", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verify"]["compressed"]["onnx"]["max_relative"] <= 1e-4
    assert report["truncate"]["layers_factored"] > 0
    assert report["bench"]["cases"][0]["sequence"] == 60  # the default, shortened to what the table allows
    assert_genai_generates(tmp_path / "run" / "artifact")
    assert invoke("bench", tmp_path / "run", "--bench-length", "100") == 2
    assert "64 positions" in capsys.readouterr().err


def test_options_from_yaml_and_flags(vit_folder, tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text(
        "task: image-classification\ndata: {data: sklearn-digits, eval_samples: 20}\n"
        "truncate: {ratio: 0.4}\ncalibrate: {samples: 16}\nbench: {threads: 1}\n"
    )
    output = tmp_path / "run"
    assert invoke("truncate", vit_folder, "-o", output, "--config", options, "--ratio", "0.7") == 0
    saved = (output / "run.yaml").read_text()
    assert "ratio: 0.7" in saved
    assert "samples: 16" in saved
    options.write_text("truncate: {ration: 0.4}\n")
    assert invoke("truncate", output, "--config", options) == 2


def test_adapter_is_merged_before_anything_else(vit_folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageClassification

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    get_peft_model(AutoModelForImageClassification.from_pretrained(vit_folder), config).save_pretrained(
        tmp_path / "lora"
    )
    output = tmp_path / "run"
    assert invoke("truncate", *vit_options(vit_folder), "-o", output, "--adapter", tmp_path / "lora") == 0
    plain = AutoModelForImageClassification.from_pretrained(vit_folder).state_dict()
    merged = AutoModelForImageClassification.from_pretrained(stage_folder(output, "merge") / "model").state_dict()
    changed = {name for name, value in plain.items() if not torch.equal(value, merged[name])}
    assert changed
    assert all(name.split(".")[-2] in ("q_proj", "fc1") for name in changed)


def test_merge_lora_into_an_artifact(finished, vit_folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageClassification

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForImageClassification.from_pretrained(vit_folder), config).save_pretrained(
        tmp_path / "lora"
    )
    assert invoke("merge-lora", finished, tmp_path / "lora", "-o", tmp_path / "merged", "--threads", 1) == 0
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = from_pretrained(tmp_path / "merged")(pixel_values=pixels).logits.numpy()
        before = from_pretrained(finished / "artifact")(pixel_values=pixels).logits.numpy()
    session = onnxruntime.InferenceSession(str(tmp_path / "merged" / "onnx" / "model.onnx"))
    (actual,) = session.run(["logits"], {"pixel_values": pixels.numpy()})
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
    assert not np.allclose(before, expected)
    assert invoke("merge-lora", finished, tmp_path / "lora", "-o", tmp_path / "merged") == 2


def test_inspect(finished, vit_folder, capsys):
    assert invoke("inspect", vit_folder, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["input_groups"] == 8
    assert sum(row["selected"] for row in facts["layers"]) == 12
    assert invoke("inspect", finished, "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers_factored"] > 0


def test_a_wrong_artifact_is_fatal_and_nothing_is_published(vit_folder, tmp_path, monkeypatch, capsys):
    """The exporter writes a weight that is not the model's: the fresh process must notice."""
    from prehab_export.pipeline.stages import export

    original = export.save_folder

    def damaged(model, folder, processor):
        next(iter(model.vit.layers[0].mlp.parameters())).data.mul_(1.01)
        original(model, folder, processor)
        next(iter(model.vit.layers[0].mlp.parameters())).data.div_(1.01)

    monkeypatch.setattr(export, "save_folder", damaged)
    output = tmp_path / "run"
    assert invoke("run", *vit_options(vit_folder), "-o", output) == 3
    assert "differ after reloading" in capsys.readouterr().err
    assert not (output / "artifact").exists()
    assert not (output / "report").exists()


BAD = {
    "missing model": (["./nowhere", "--task", "image-classification", "--data", "sklearn-digits"], "no such"),
    "missing data": (["VIT", "--task", "image-classification", "--data", "./nowhere.csv"], "nowhere.csv"),
    "wrong task": (["VIT", "--task", "text-classification", "--data", "CSV"], "image-classification"),
    "unknown column": (["BERT", "--task", "text-classification", "--data", "CSV", "--input-column", "nope"], "nope"),
    "ratio": (
        ["VIT", "--task", "image-classification", "--data", "sklearn-digits", "--ratio", "1.2"],
        "between 0 and 1",
    ),
    "pattern": (
        ["VIT", "--task", "image-classification", "--data", "sklearn-digits", "--include", "*zzz*"],
        "matches no",
    ),
    "adapter": (
        ["VIT", "--task", "image-classification", "--data", "sklearn-digits", "--adapter", "ADAPTER"],
        "adapter",
    ),
    "label": (["BERT", "--task", "text-classification", "--data", "LABELS"], "label"),
    "empty split": (["BERT", "--task", "text-classification", "--data", "EMPTY"], "empty|no rows|no data"),
    "no task": (["VIT", "--data", "sklearn-digits"], "--task"),
    "steps": (
        ["VIT", "--task", "image-classification", "--data", "sklearn-digits", "--rehab-steps", "-1"],
        "0 or more",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_at_once_with_a_sentence(case, vit_folder, bert_folder, reviews, tmp_path, capsys):
    import re

    labels, empty, adapter = tmp_path / "labels.csv", tmp_path / "empty.csv", tmp_path / "adapter"
    labels.write_text("text,label\n" + "good film,0\nbad film,7\n" * 20)
    empty.write_text("text,label\n")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    places = {
        "VIT": vit_folder,
        "BERT": bert_folder,
        "CSV": reviews,
        "LABELS": labels,
        "EMPTY": empty,
        "ADAPTER": adapter,
    }
    arguments, message = BAD[case]
    code = invoke("run", *(places.get(argument, argument) for argument in arguments), "-o", tmp_path / "run")
    error = capsys.readouterr().err
    assert code == 2
    assert re.search(message, error, re.IGNORECASE), error
    assert "Traceback" not in error
    assert not list((tmp_path / "run").glob("stages/*"))


def test_a_folder_that_holds_something_else_is_left_alone(vit_folder, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert invoke("run", *vit_options(vit_folder), "-o", tmp_path) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_no_disk_space_is_said_before_any_work(vit_folder, tmp_path, monkeypatch, capsys):
    import collections

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage(100, 100, 0))
    assert invoke("run", *vit_options(vit_folder), "-o", tmp_path / "run") == 2
    assert "GB are free" in capsys.readouterr().err


def test_nan_weights_name_the_tensor(vit_folder, tmp_path, capsys):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(vit_folder)
    model.vit.layers[1].mlp.fc1.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    AutoImageProcessor.from_pretrained(vit_folder, backend="pil").save_pretrained(tmp_path / "nan")
    options = vit_options(tmp_path / "nan")
    assert invoke("run", *options, "-o", tmp_path / "run") == 2
    assert "layers.1.mlp.fc1" in capsys.readouterr().err


def test_two_runs_in_one_folder_are_refused(vit_folder, tmp_path, capsys):
    with Workspace.open(tmp_path / "run").locked():
        assert invoke("run", *vit_options(vit_folder), "-o", tmp_path / "run") == 2
    assert "another run" in capsys.readouterr().err


def killed_at(stage: str, arguments: list[str], output: Path) -> None:
    """Start a run and SIGKILL its whole process group as soon as the stage has begun to write."""
    process = subprocess.Popen(command(*arguments), start_new_session=True, stderr=subprocess.DEVNULL)
    begun, done = output / "stages" / stage, output / "manifests" / stage
    while process.poll() is None and not begun.exists() and not done.exists():
        time.sleep(0.002)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    "stage",
    [
        "truncate",
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in ("artifact", "calibrate", "prehab", "rehab", "export", "baseline", "verify", "bench")
        ),
    ],
)
def test_a_killed_run_ends_in_the_same_artifact(stage, finished, vit_folder, tmp_path):
    output = tmp_path / "run"
    arguments = ["run", *vit_options(vit_folder), "-o", output, *TRAINED]
    killed_at(stage, arguments, output)
    assert not (output / "report").exists()
    assert subprocess.run(command(*arguments), check=False, stderr=subprocess.DEVNULL).returncode == 0
    assert hashes(output / "artifact") == hashes(finished / "artifact")


@pytest.mark.slow
def test_a_killed_text_run_ends_in_the_same_artifact(bert_folder, reviews, tmp_path):
    """A tokenizer that has been used must not leave its mark on what is saved."""
    arguments = ["run", bert_folder, "--task", "text-classification", "--data", reviews, *QUICK, *TEXT]
    assert invoke(*arguments, "-o", tmp_path / "whole") == 0
    killed_at("export", [*arguments, "-o", tmp_path / "killed"], tmp_path / "killed")
    assert invoke(*arguments, "-o", tmp_path / "killed") == 0
    assert hashes(tmp_path / "killed" / "artifact") == hashes(tmp_path / "whole" / "artifact")


def test_leftovers_of_a_kill_are_cleared_and_foreign_folders_kept(vit_folder, tmp_path, capsys):
    output = tmp_path / "run"
    assert invoke("calibrate", *vit_options(vit_folder), "-o", output) == 0
    (output / "run.yaml.partial").write_text("half")
    (output / "manifests" / "x.json.partial").write_text("half")
    (output / "stages" / "truncate" / "0123.partial").mkdir(parents=True)
    (output / ".kit-abc").mkdir()
    assert invoke("calibrate", output) == 0
    assert not list(output.rglob("*.partial"))
    assert not (output / ".kit-abc").exists()
    foreign = tmp_path / "cluster"
    (foreign / "manifests").mkdir(parents=True)
    (foreign / "manifests" / "deployment.yaml").write_text("kind: Deployment")
    assert invoke("run", *vit_options(vit_folder), "-o", foreign) == 2
    assert (foreign / "manifests" / "deployment.yaml").is_file()


def test_results_of_other_options_are_out_of_sight_and_found_again(finished, tmp_path):
    """Hours of prehab must not be lost to an option that is tried and taken back."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before, artifact, report = made(output), hashes(output / "artifact"), hashes(output / "report")
    assert invoke("truncate", output, "--prehab-steps", "0") == 0
    assert not has_stage(output, "prehab")
    assert not (output / "artifact").exists()
    assert not (output / "report").exists()
    assert (output / "baseline" / "onnx" / "model.onnx").is_file()  # asks for no prehab
    assert len(made(output)) == len(before) + 1
    assert invoke("report", output, "--prehab-steps", "4") == 0
    assert len(made(output)) == len(before) + 1
    assert hashes(output / "artifact") == artifact
    assert hashes(output / "report") == report


def test_the_report_has_no_measurements_of_other_graphs(finished, tmp_path, capsys):
    """A board's times of an earlier artifact must not stand beside this one's accuracy."""
    output, board = tmp_path / "run", tmp_path / "board.json"
    shutil.copytree(finished, output)
    assert invoke("bench", output, "--target", f"kit:{tmp_path / 'kit'}") == 0
    digest = hashlib.sha256((tmp_path / "kit" / "kit.json").read_bytes()).hexdigest()
    made = json.loads((output / "manifests" / "kits.json").read_text())
    graph = output / "artifact" / "onnx" / "model.onnx"
    assert made[digest]["compressed"] == hashlib.sha256(graph.read_bytes()).hexdigest()
    device = {
        "cpu": "board",
        "cores": 2,
        "os": "Linux",
        "runtime": "onnxruntime",
        "runtime_version": "1",
        "governor": None,
    }
    parity = {"parity": [{"model": "compressed", "max_abs": 0.0, "same_tokens": None}]}
    empty = {"format": 1, "place": "board", "cases": [], "drift": [], "comparison": []}
    board.write_text(json.dumps({"kit": digest, "device": device, **parity, **empty}))
    assert invoke("report", output, "--target-results", board) == 0
    assert list(json.loads((output / "report" / "report.json").read_text())["targets"]) == ["board"]
    made[digest]["compressed"] = "of another graph"
    (output / "manifests" / "kits.json").write_text(json.dumps(made))
    capsys.readouterr()
    assert invoke("report", output, "--target-results", board) == 0
    assert "kit of other options" in capsys.readouterr().err
    assert json.loads((output / "report" / "report.json").read_text())["targets"] == {}


def test_work_done_again_that_comes_out_the_same_leaves_the_rest_valid(finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before, artifact = made(output), hashes(output / "artifact")
    assert invoke("truncate", output, "--force") == 0
    again = {place for place, when in made(output).items() if before[place] != when}
    assert [place.partition("/")[0] for place in again] == ["truncate"]
    assert hashes(output / "artifact") == artifact
    assert (output / "report" / "report.md").is_file()


@pytest.mark.slow
def test_what_follows_work_that_came_out_otherwise_is_done_again(vit_folder, tmp_path, monkeypatch):
    """The artifact must be of the cut that the report quotes."""
    from prehab_export.pipeline.stages import compress as stages

    output = tmp_path / "run"
    options = [*vit_options(vit_folder), "-o", output]
    assert invoke("verify", *options) == 0
    artifact, original = hashes(output / "artifact"), stages._compress_model

    def otherwise(session, calibrated, save_to):
        result = original(session, calibrated, save_to)
        for pair in result.truncation.factors.values():
            pair.up.mul_(0.5)
        return result

    monkeypatch.setattr(stages, "_compress_model", otherwise)
    assert invoke("truncate", *options, "--force") == 0
    assert not (output / "artifact").exists()
    monkeypatch.setattr(stages, "_compress_model", original)
    assert invoke("verify", *options) == 0
    assert hashes(output / "artifact")["model.safetensors"] != artifact["model.safetensors"]
    cut, exported = (from_pretrained(stage_folder(output, stage) / "model") for stage in ("truncate", "export"))
    assert all(torch.equal(value, exported.state_dict()[name]) for name, value in cut.state_dict().items())


def test_work_done_again_that_is_killed_makes_no_leftovers_of_what_was_there(finished, tmp_path, monkeypatch):
    from prehab_export.pipeline.stages import calibrate as stages

    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before = made(output)

    def killed(*_, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "gather_statistics", killed)
    assert invoke("calibrate", output, "--force") == 130
    assert (output / "artifact").is_dir()
    assert invoke("clean", output) == 0
    assert made(output) == before


def test_what_is_refuted_when_done_again_does_not_come_back(finished, tmp_path, monkeypatch):
    from prehab_export.pipeline import running as pipeline
    from prehab_export.system.errors import ParityError

    output = tmp_path / "run"
    shutil.copytree(finished, output)

    def refuted(*_):
        raise ParityError("the artifact answers otherwise")

    monkeypatch.setattr(pipeline, "_run_stage", refuted)
    assert invoke("verify", output, "--force") == 3
    assert not (output / "artifact").exists()
    assert invoke("report", output) == 3  # verified again, not taken as verified before
    assert not (output / "artifact").exists()


@pytest.mark.parametrize(
    "changed", [["--refine-steps", "2"], ["--refine-batch-size", "4"], ["--set", "bench.new_tokens=3"]]
)
def test_refinement_costs_no_stage_before_it(changed, finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before = made(output)
    assert invoke("refine", output, *changed) == 0
    new = {place.partition("/")[0] for place in made(output).keys() - before.keys()}
    assert new == ({"refine"} if changed[0] == "--refine-steps" else set())


def test_clean_removes_what_no_current_option_needs(finished, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    artifact = hashes(output / "artifact")
    assert invoke("truncate", output, "--ratio", "0.8") == 0
    assert invoke("report", output, "--ratio", "0.6") == 0
    (output / "stages" / "fit-model-abc" / "0123").mkdir(parents=True)
    (output / "stages" / "fit-model-abc" / "0123" / "model.onnx").write_bytes(b"0" * 1000)
    before = made(output)
    capsys.readouterr()
    assert invoke("clean", output, "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["stage"] for row in told} == {"prehab", "truncate", "fit-model-abc"}  # prehab knows the ratio
    assert {row["bytes"] for row in told if row["stage"] == "fit-model-abc"} == {1000}
    assert made(output) == before
    assert invoke("clean", output) == 0
    assert "freed" in capsys.readouterr().out
    assert not (output / "stages" / "fit-model-abc").exists()
    assert len(made(output)) == len(before) - 2
    assert hashes(output / "artifact") == artifact
    assert invoke("report", output) == 0
    assert len(made(output)) == len(before) - 2
    assert invoke("clean", output) == 0
    assert "nothing to remove" in capsys.readouterr().out
    assert invoke("clean", tmp_path) == 2


def test_what_an_earlier_version_left_is_not_trusted_and_clean_removes_it(vit_folder, tmp_path):
    """Its results lay directly under their stage, their manifests beside each other."""
    output = tmp_path / "run"
    old = {
        "manifests/.prehab-export": "",
        "manifests/calibrate.json": '{"key": "0", "files": {"calibrate.json": "0"}}',
        "stages/calibrate/calibrate.json": "{}",
        "stages/calibrate/statistics.safetensors": "moments",
        "stages/truncate/model/config.json": "{}",
        "artifact/config.json": "{}",
    }
    for name, text in old.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(text)
    assert invoke("calibrate", *vit_options(vit_folder), "-o", output) == 0
    assert not (output / "artifact").exists()
    (result,) = made(output)
    assert invoke("clean", output) == 0
    assert list(made(output)) == [result]
    assert [path.name for path in (output / "stages").glob("*/*")] == [Path(result).stem]
    assert [path.name for path in (output / "stages").iterdir()] == ["calibrate"]
    assert not (output / "manifests" / "calibrate.json").exists()
    assert invoke("calibrate", output) == 0
    assert list(made(output)) == [result]


def test_clean_keeps_what_the_options_start_from(vit_folder, tmp_path):
    output = tmp_path / "run"
    (output / "manifests").mkdir(parents=True)
    (output / "manifests" / ".prehab-export").touch()
    shutil.copytree(vit_folder, output / "stages" / "dense" / "0123" / "vit")
    assert invoke("calibrate", *vit_options(output / "stages" / "dense" / "0123" / "vit"), "-o", output) == 0
    assert invoke("clean", output) == 0
    assert invoke("calibrate", output) == 0


def test_clean_counts_what_it_frees(finished, tmp_path, capsys):
    """The artifact's files are those of the export; taking one of their names away frees nothing."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    stage = stage_folder(output, "export")
    other = stage.parents[1] / "artifact" / "0123"
    shutil.copytree(stage / "model", other, copy_function=lambda source, target: os.link(source, target))
    (other / "own.txt").write_bytes(b"0" * 10)
    shutil.copytree(other, stage.parents[1] / "artifact" / "0124", copy_function=os.link)
    capsys.readouterr()
    assert invoke("clean", output, "--json") == 0
    assert sum(row["bytes"] for row in json.loads(capsys.readouterr().out)) == 10


def test_records_that_a_power_cut_left_empty_are_made_again(vit_folder, tmp_path):
    output = tmp_path / "run"
    assert invoke("calibrate", *vit_options(vit_folder), "-o", output) == 0
    for record in (output / "manifests").rglob("*.json"):
        record.write_text("")
    assert invoke("calibrate", output) == 0
    assert has_stage(output, "calibrate")


def test_results_that_someone_has_deleted_are_not_selected(finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    shutil.rmtree(stage_folder(output, "artifact"))
    assert not has_stage(output, "artifact")
    Workspace.open_existing(output).save_selection()
    assert not (output / "artifact").exists()


def test_what_another_process_selected_counts_once_the_folder_is_ours(finished, tmp_path):
    """Clean must not take away what a run has made between its start and its lock."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before = Workspace.open_existing(output)
    other = Workspace.open_existing(output)
    other.current.pop("report")
    other.save_selection()
    with before.locked():
        assert before.current == other.current


def test_a_model_with_code_of_its_own_is_another_model(vit_folder, tmp_path):
    output = tmp_path / "run"
    assert invoke("calibrate", *vit_options(vit_folder), "-o", output) == 0
    assert invoke("calibrate", output, "--trust-remote-code") == 0
    assert len(made(output)) == 2


def test_export_does_its_own_work_again_with_ort_files_too(finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before = made(output)
    assert invoke("export", output, "--ort", "--force") == 0
    again = {place.partition("/")[0] for place, when in made(output).items() if before.get(place) != when}
    assert again >= {"export", "baseline", "ort"}


def test_the_demo_can_be_gone_on_with_from_another_folder(tmp_path, monkeypatch):
    from prehab_export.pipeline import demo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_train_vit", lambda folder: folder.mkdir())
    monkeypatch.setattr(demo, "run", lambda config, _output: config)
    assert Path(demo.run_demo(Path("demo-run"), 1).model).is_absolute()


def test_saved_options_can_be_taken_back(vit_folder, tmp_path, capsys):
    output = tmp_path / "run"
    given = ["--set", "quantize=int4", "--include", "*mlp*", "--set", "truncate.ratio=0.5"]
    assert invoke("calibrate", *vit_options(vit_folder), "-o", output, *given) == 0
    saved = yaml.safe_load((output / "run.yaml").read_text())
    assert saved["truncate"]["rank_multiple"] is None  # what int4 asks for is not the user's word
    assert invoke("calibrate", output, "--unset", "quantize", "--unset", "include") == 0
    saved = yaml.safe_load((output / "run.yaml").read_text())
    assert (saved["quantize"], saved["calibrate"]["include"], saved["truncate"]["ratio"]) == ([], [], 0.5)
    assert invoke("calibrate", output, "--unset", "quantise") == 2
    assert "did you mean quantize" in capsys.readouterr().err
    assert invoke("calibrate", output, "--set", "ort=true") == 0
    assert invoke("calibrate", output, "--unset", "--no-ort") == 0  # by either of its names
    assert yaml.safe_load((output / "run.yaml").read_text())["ort"] is False
    (tmp_path / "flat.yaml").write_text("truncate: 0.5\n")
    assert invoke("calibrate", output, "--config", tmp_path / "flat.yaml", "--unset", "ratio") == 2
    assert "expected a section" in capsys.readouterr().err
    assert invoke("calibrate", output, "--unset", "task") == 2
    assert "--task is missing" in capsys.readouterr().err


def test_export_tells_of_the_compressed_model_first(finished, capsys):
    assert invoke("export", finished, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    report = json.loads((finished / "report" / "report.json").read_text())
    assert {key: told[key] for key in report["export"]} == report["export"]
    assert told["baseline"] == report["baseline"]
    assert told["bytes"] != told["baseline"]["bytes"]


@pytest.mark.parametrize("kind", ["python", "safetensors"])
def test_a_disk_that_fills_is_a_sentence_and_leaves_nothing_half_done(kind, vit_folder, tmp_path, monkeypatch, capsys):
    """The device that is always full stands in for the disk; a library of another language hands its words on."""
    from safetensors import SafetensorError

    from prehab_export.compression import checkpoints

    output = tmp_path / "run"

    def full(_tensors, path, **_options):
        path.write_bytes(b"half of it")
        try:
            with open("/dev/full", "wb", buffering=0) as file:
                file.write(b"moments")
        except OSError as error:
            if kind == "python":
                raise
            words = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
        raise SafetensorError(words)

    monkeypatch.setattr(checkpoints, "save_file", full)
    assert invoke("calibrate", *vit_options(vit_folder), "-o", output) == 6
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "Free some space" in error
    assert "Traceback" not in error
    assert not list(output.rglob("*.partial"))
    assert made(output) == {}
    monkeypatch.undo()
    assert invoke("calibrate", *vit_options(vit_folder), "-o", output) == 0


def test_input_that_cannot_be_read_for_want_of_room_is_no_bad_input(vit_folder, tmp_path, monkeypatch, capsys):
    """Data and models are unpacked into temporary folders and caches, which may be on a full disk."""
    from prehab_export.inputs.data import source as data_source

    def full():
        Path("/dev/full").write_bytes(b"rows")

    monkeypatch.setattr(data_source, "_digits", full)
    assert invoke("calibrate", *vit_options(vit_folder), "-o", tmp_path / "run") == 6
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "good film,0\nbad film,1\n" * 20)
    monkeypatch.setattr(data_source, "_from_file", lambda *_: full())
    options = [vit_folder, "--task", "image-classification", "--data", data, *QUICK]
    assert invoke("calibrate", *options, "-o", tmp_path / "other") == 6
    error = capsys.readouterr().err
    assert error.count("No space left on device") == error.count("free some space") == 2
    assert "Traceback" not in error


def test_verification_without_room_says_so(finished, tmp_path, monkeypatch, capfd):
    from prehab_export.pipeline.stages import verify as verification

    output = tmp_path / "run"
    shutil.copytree(finished, output)
    script = (
        "import sys\nfrom pathlib import Path\nfrom prehab_export.pipeline.stages import verify as verification\n"
        "verification.verify = lambda _session: open('/dev/full', 'wb', buffering=0).write(b'rows')\n"
        "verification._main(Path(sys.argv[1]))"
    )
    monkeypatch.setattr(verification, "python_module", lambda _name, place: [sys.executable, "-c", script, place])
    assert invoke("verify", output, "--force") == 6
    error = capfd.readouterr().err
    assert "the disk is full" in error
    assert "No space left on device" in error
    assert "Traceback" not in error


def test_files_that_were_not_touched_are_not_read_again(finished, tmp_path, monkeypatch):
    """A verb on a large run must not read every stage, nor the model, from end to end."""
    from prehab_export.system import digests

    output = tmp_path / "run"
    shutil.copytree(finished, output, copy_function=shutil.copy)  # with new times: read once, then remembered
    assert invoke("report", output) == 0
    read = []
    monkeypatch.setattr(digests, "sha256_of", lambda path: read.append(path) or "")
    assert invoke("report", output) == 0
    assert read == []


def test_help_loads_nothing_heavy():
    script = (
        "import sys\nfrom prehab_export.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'onnx', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).returncode == 0
