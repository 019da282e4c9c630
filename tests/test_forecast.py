"""What ``--dry-run`` foretells: it agrees with what a run does, refuses what a run would refuse, writes nothing."""

import json
from dataclasses import replace

import pytest
import torch
from runs import stage_folder
from test_pipeline import BAD, QUICK, TEXT, hashes, invoke, vit_options
from transformers import BartConfig, BartForSequenceClassification

from prehab_export import forecast
from prehab_export.config.calibrate import CalibrateConfig
from prehab_export.config.data import DataConfig
from prehab_export.config.run import RunConfig
from prehab_export.config.training import PrehabConfig, RefineConfig, RefineSchedule, RehabConfig, TrainConfig
from prehab_export.config.truncate import TruncateConfig
from prehab_export.pipeline.effort import Counts, Effort, Work
from prehab_export.pipeline.graph_sizes import ParameterCounts
from prehab_export.pipeline.memory import Memory
from prehab_export.pipeline.pace import Pace, measure_pace
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.stages.dependencies import DEPENDENCIES
from prehab_export.pipeline.workload import Layer, Workload, _count_operations, count_workload
from prehab_export.pipeline.workspace import Workspace


def facts_of(capsys, *arguments) -> dict:
    capsys.readouterr()
    assert invoke(*arguments, "--dry-run", "--json") == 0
    return json.loads(capsys.readouterr().out)


def states(facts: dict) -> dict[str, str]:
    return {row["stage"]: row["state"] for row in facts["stages"]}


def sizes(facts: dict) -> dict[str, dict]:
    return {row["name"]: row for row in facts["sizes"]}


def test_a_new_folder_is_not_made_and_no_weights_are_read(vit_folder, tmp_path, monkeypatch, capsys):
    from prehab_export.pipeline import session

    monkeypatch.setattr(session, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    assert invoke("run", *vit_options(vit_folder), "-o", tmp_path / "run", "--dry-run") == 0
    told = capsys.readouterr()
    assert not (tmp_path / "run").exists()
    assert "vit.layers.*.attention.q_proj" in told.out
    assert "of the model's parameters are in the layers to compress" in told.out
    assert "ranks will move between layers" in told.out
    assert "nothing was written" in told.out


def test_it_agrees_with_the_run(bert_folder, reviews, tmp_path, capsys):
    options = ["--task", "text-classification", "--data", reviews, *QUICK, *TEXT, "-o", tmp_path / "run"]
    options += ["--allocation", "uniform", "--ratio", "0.5", "--quantize", "int8"]
    told = facts_of(capsys, "run", bert_folder, *options)
    assert invoke("quantize", bert_folder, *options) == 0
    cut = json.loads((stage_folder(tmp_path / "run", "truncate") / "truncate.json").read_text())
    for name in ("selected", "total"):
        assert told[name]["before"] == cut[f"{name}_parameters_before"]
        assert told[name]["after"] == cut[f"{name}_parameters_after"]
    ranks = {row["name"]: row["rank"] for row in cut["layers"]}
    assert all(row["ranks"][0] == row["ranks"][1] for row in told["layers"])
    assert sum(row["layers"] for row in told["layers"]) == len(ranks)
    assert {rank for row in told["layers"] for rank in row["ranks"]} == set(ranks.values())
    assert told["coverage"]["selected_share"] == pytest.approx(cut["coverage"]["selected_share"])
    files = {}
    for side, stage in (("before", "baseline"), ("after", "export")):
        written = json.loads((stage_folder(tmp_path / "run", stage) / "export.json").read_text())
        files[side] = written["bytes"]
    for side, bytes_ in files.items():  # of small models the operators weigh something too
        assert sizes(told)["ONNX graph, float32"][side] == pytest.approx(bytes_, abs=60_000)
        assert sizes(told)["ONNX graph, float32"][side] < bytes_
    assert set(states(told).values()) == {"to do", "not wanted"}
    # And once it is there, its ranks are taken.
    done = facts_of(capsys, "run", tmp_path / "run", "--allocation", "loss")
    assert states(done)["truncate"] == "to do"
    done = facts_of(capsys, "run", tmp_path / "run", "--allocation", "uniform")
    assert done["ranks_from"] == "the existing truncation"
    assert done["selected"]["after"] == cut["selected_parameters_after"]
    assert [stage for stage, state in states(done).items() if state == "to do"] == ["artifact", "bench", "report"]


@pytest.mark.slow
def test_of_a_run_that_is_there_only_the_rest_is_to_do_and_nothing_changes(vit_folder, tmp_path, capsys):
    output = tmp_path / "run"
    assert invoke("truncate", *vit_options(vit_folder), "-o", output) == 0
    for record in output.glob("manifests/*/*.json"):  # as after a copy, whose times are others
        record.write_text(record.read_text().replace('"mtime_ns": 1', '"mtime_ns": 2'))
    before = hashes(output)
    facts = facts_of(capsys, "truncate", output)
    assert states(facts) == dict.fromkeys(("merge", "times", "prehab"), "not wanted") | {
        "calibrate": "up to date",
        "truncate": "up to date",
    }
    assert facts["seconds"] == 0
    told = states(facts_of(capsys, "export", output, "--ratio", "0.8"))
    assert (told["calibrate"], told["truncate"], told["export"]) == ("up to date", "to do", "to do")
    facts = facts_of(capsys, "calibrate", output, "--force")
    assert states(facts)["calibrate"] == "to do"
    assert invoke("export", output) == 0
    before = hashes(output)
    told = states(facts_of(capsys, "export", output, "--force"))
    assert (told["truncate"], told["export"], told["baseline"]) == ("up to date", "to do", "to do")
    assert invoke("verify", output) == 0
    before = hashes(output)
    facts = facts_of(capsys, "report", output, "--force")
    assert (states(facts)["verify"], states(facts)["artifact"], states(facts)["bench"]) == ("to do",) * 3
    assert hashes(output) == before


@pytest.mark.parametrize("case", ["missing model", "wrong task", "unknown column", "ratio", "pattern", "empty split"])
def test_bad_input_is_refused_as_a_run_refuses_it(case, vit_folder, bert_folder, reviews, tmp_path, capsys):
    empty = tmp_path / "empty.csv"
    empty.write_text("text,label\n")
    places = {"VIT": vit_folder, "BERT": bert_folder, "CSV": reviews, "EMPTY": empty}
    arguments = [places.get(argument, argument) for argument in BAD[case][0]]
    told = []
    for more in ([], ["--dry-run"]):
        assert invoke("run", *arguments, "-o", tmp_path / "run", *more) == 2
        told.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("error")])
    assert told[0] == told[1]


def test_a_model_that_cannot_be_exported_is_refused_before_a_run(prose, tmp_path, capsys):
    import transformers
    from conftest import word_tokenizer

    from converters.folder import save_folder

    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    save_folder(transformers.MambaForCausalLM(config), tmp_path / "mamba", word_tokenizer())
    options = ["--task", "text-generation", "--data", prose, "--sequence-length", "16", "-o", tmp_path / "out"]
    options += [*QUICK, "--set", "bench.sequence_lengths=16"]
    assert invoke("run", tmp_path / "mamba", *options, "--dry-run") == 2
    assert "key/value cache" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_refused(vit_folder, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert invoke("run", *vit_options(vit_folder), "-o", tmp_path, "--dry-run") == 2
    assert "holds something else" in capsys.readouterr().err


def test_ranks_of_a_budget_of_latency_are_not_made_up(vit_folder, tmp_path, capsys):
    facts = facts_of(capsys, "run", *vit_options(vit_folder), "-o", tmp_path / "run", "--budget", "latency:0.5")
    assert {row["ranks"] for row in facts["layers"]} == {None}
    assert facts["selected"]["after"] is None
    assert states(facts)["times"] == "to do"
    assert any("measured times" in note for note in facts["notes"])
    assert invoke("run", *vit_options(vit_folder), "-o", tmp_path / "run", "--budget", "latency:0.5", "--dry-run") == 0
    assert "?" in capsys.readouterr().out


def test_it_tells_nothing_of_other_places(vit_folder, tmp_path, capsys):
    options = [*vit_options(vit_folder), "-o", tmp_path / "run", "--dry-run", "--target", "browser"]
    assert invoke("bench", *options) == 2
    assert "--dry-run does not cover measurements at a target" in capsys.readouterr().err


# What it is made of


def session_of(model, task, data, **options):
    config = RunConfig(str(model), task, DataConfig(str(data), **options), calibrate=CalibrateConfig(samples=16))
    return Session(config, Workspace.open_read_only(model.parent / "nowhere"))


def test_the_workload_is_counted_on_the_model_itself(llama_folder, prose):
    load = count_workload(session_of(llama_folder, "text-generation", prose, sequence_length=16))
    assert {layer.rows for layer in load.layers} == {16.0}
    assert len(load.inputs) == 2 * 4  # q, k and v share one, gate and up another
    assert load.blocks == 2
    products = sum(2 * layer.m * layer.n * layer.rows for layer in load.layers) + 2 * 32 * 64 * 16
    assert products < load.flops < 1.5 * products
    assert load.layers[0].kind == "model.layers.*.self_attn.q_proj"


def test_a_model_that_does_not_run_without_weights_is_counted_by_its_parameters():
    config = BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, vocab_size=64, eos_token_id=3, pad_token_id=0)
    with torch.device("meta"):
        model = BartForSequenceClassification(config)
    assert _count_operations(model, {}, {"input_ids": torch.zeros(2, 4, dtype=torch.long)}) is None


LOAD = Workload(1e9, 1e6, 1e3, 10**7, tuple(Layer(f"m.{at}.q", 384, 384, 50.0, at) for at in range(6)))
COUNTS = Counts(512, 512, 1000)


def everything(steps: int = 64, **changes) -> RunConfig:
    train = TrainConfig(steps=steps)
    config = RunConfig(
        "m",
        "text-classification",
        DataConfig("d"),
        adapter="a",
        prehab=PrehabConfig(train=train),
        refine=RefineConfig(RefineSchedule(steps=steps)),
        rehab=RehabConfig(train=train),
        truncate=TruncateConfig(budget="latency:0.5"),
        quantize=("int8", "float16"),
        ort=True,
    )
    return replace(config, **changes)


def seconds(config: RunConfig, stage: str, kept: float = 0.4) -> float:
    return Effort(config, LOAD, COUNTS, kept).stage_work(stage).at(Pace(1e11, 5e10, 1.0))


def test_every_stage_has_an_effort_and_more_work_takes_longer():
    short, long = everything(), everything(steps=128)
    for stage in DEPENDENCIES:
        assert 0 < seconds(short, stage) < 3600
        if stage != "bench":
            assert Memory(short, LOAD, 0.4).need(stage).total >= 0
    for stage in ("prehab", "refine", "rehab"):
        assert seconds(long, stage) > 1.5 * seconds(short, stage) - 10
    assert seconds(replace(short, prehab=replace(short.prehab, strength="auto")), "prehab") > seconds(short, "prehab")
    assert seconds(short, "verify", kept=0.9) > seconds(short, "verify", kept=0.1)
    unguarded = replace(short, prehab=replace(short.prehab, guard=False))
    assert seconds(unguarded, "prehab") < seconds(short, "prehab")


def test_work_adds_up():
    assert Work(1, 2, 3) + Work(1, 1, 1).times(2) == Work(3, 4, 5)
    assert Work(2e9, 1e9, 1.0).at(Pace(1e9, 1e9, 2.0)) == pytest.approx(5.0)
    pace = measure_pace(torch.device("cpu"))
    assert min(pace.float32, pace.float64, pace.slowness) > 0


def test_a_table_that_is_the_head_too_is_counted_once():
    from small_models import build

    model = build("llama-tied")
    numbers = ParameterCounts.of(model)
    assert numbers.matrices + numbers.tables + numbers.others == sum(weight.numel() for weight in model.parameters())
    assert numbers.tables == 50 * 32
    assert numbers.bytes("float32") == 4 * sum(weight.numel() for weight in model.parameters())
    assert numbers.bytes("int4") < numbers.bytes("int8") < numbers.bytes("float16") < numbers.bytes("float32")
    assert numbers.bytes("float32", removed=100) == numbers.bytes("float32") - 400


def test_the_function_serves_a_notebook(vit_folder, tmp_path):
    config = RunConfig(str(vit_folder), "image-classification", DataConfig("sklearn-digits", eval_samples=24))
    found = forecast(config, tmp_path / "run", until="truncate")
    assert [stage.stage for stage in found.stages][-1] == "truncate"
    assert found.seconds > 0
    assert found.memory_bytes > 1e8
