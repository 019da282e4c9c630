"""The command line: which options each verb has, and what saved options, YAML files, --set, --unset and flags make."""

import ast
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_pipeline import invoke, vit_options

from converters.errors import InputError
from prehab_export.cli.commands import cli
from prehab_export.cli.options import FLAGS, flag_paths, flags_through
from prehab_export.cli.stage_verbs import STAGE_VERBS
from prehab_export.config.data import DataConfig
from prehab_export.config.keys import known_keys, nearest, sections
from prehab_export.config.options import checked_options, from_dict, read_options, read_setting, to_yaml
from prehab_export.config.run import RunConfig
from prehab_export.config.training import PrehabConfig, RefineConfig, RefineSchedule, RehabConfig, TrainConfig
from prehab_export.config.tree import differences, flat, merged, with_value, without
from prehab_export.pipeline.stages.dependencies import DEPENDENCIES

ROOT = Path(__file__).resolve().parents[1]
# What the issue calls an expert's knob: keys without a flag.
KNOBS = ("prehab.update", "prehab.refresh_every", "prehab.layer_weights", "truncate.floor_share", "bench.rounds")


# The tree of options

NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(".".join)
TREES = st.recursive(st.integers(), lambda inner: st.dictionaries(NAMES, inner, max_size=3), max_leaves=8).filter(
    lambda tree: isinstance(tree, dict)
)


@given(TREES, PATHS, st.integers())
def test_what_is_set_is_there_and_can_be_taken_out(tree, path, value):
    before = repr(tree)
    changed = with_value(tree, path, value)
    assert flat(changed)[path] == value
    assert path not in flat(without(changed, path))
    others = {name: at for name, at in flat(tree).items() if not f"{path}.".startswith(f"{name}.")}
    assert {name: at for name, at in others.items() if not name.startswith(f"{path}.")}.items() <= flat(changed).items()
    assert repr(tree) == before


@given(TREES, TREES)
def test_merging_keeps_what_the_other_does_not_say(base, over):
    both = flat(merged(base, over))
    assert flat(over).items() <= both.items()
    assert merged(base, base) == base
    assert merged(base, {}) == base
    assert {one.path for one in differences(base, over)} == {
        path for path in flat(base).keys() | flat(over).keys() if flat(base).get(path) != flat(over).get(path)
    }


def test_a_tuple_of_a_config_and_a_list_of_a_file_are_the_same():
    assert differences({"a": (1, 2)}, {"a": [1, 2]}) == []


# Names and values


def test_every_option_and_every_section_says_what_it_is():
    for key in known_keys().values():
        assert len(key.meaning) > 10, key.path
        assert not key.meaning.endswith("."), key.path
    assert all(len(title) > 10 for title in sections().values())
    assert set(flat(asdict(everything()))) == set(known_keys())


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ({"truncate": {"ration": 0.5}}, "truncate.ratio"),
        ({"ratio": 0.5}, "truncate.ratio"),
        ({"trunctae": {"ratio": 0.5}}, "truncate"),
        ({"prehab": {"steps": 4}}, "prehab.train.steps"),
        ({"refine": {"schedule": {"step": 4}}}, "refine.schedule.steps"),
        ({"bench": {"batch-sizes": [1]}}, "bench.batch_sizes"),
    ],
)
def test_an_unknown_key_is_refused_by_name_with_the_nearest(wrong, meant, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump(wrong))
    (name,) = flat(wrong)
    path = name if meant != "truncate" else "trunctae"
    message = f"unknown option {path} in {file}; did you mean {meant}?"
    with pytest.raises(InputError, match=re.escape(message)):
        read_options(file)


def test_a_key_that_is_like_none_points_to_the_list():
    assert nearest("zzzz") is None
    with pytest.raises(InputError, match=r"unknown option zzzz; `prehab-export options` lists"):
        checked_options({"zzzz": 1})


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"truncate": {"ratio": "much"}}, "truncate.ratio in f.yaml: expected a number, found 'much'"),
        ({"seed": 1.5}, "seed in f.yaml: expected a whole number, found 1.5"),
        ({"ort": "perhaps"}, "ort in f.yaml: expected true or false"),
        ({"task": 3}, "task in f.yaml: expected text"),
        ({"truncate": 0.5}, "truncate in f.yaml: expected a section with keys, found 0.5"),
        ({"bench": {"batch_sizes": [1, "two"]}}, "bench.batch_sizes in f.yaml: expected a whole number, found 'two'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_its_place(wrong, expected):
    with pytest.raises(InputError, match=re.escape(expected)):
        checked_options(wrong, "f.yaml")


def test_a_section_of_which_every_line_is_commented_out_says_nothing():
    assert checked_options({"truncate": None}) == {"truncate": {}}


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("truncate.floor_share=0.2", "truncate.floor_share", 0.2),
        ("truncate.floor_share = 1e-2", "truncate.floor_share", 0.01),
        ("bench.batch_sizes=[1, 8]", "bench.batch_sizes", (1, 8)),
        ("bench.batch_sizes=8", "bench.batch_sizes", (8,)),
        ("quantize=[]", "quantize", ()),
        ("calibrate.include=*.mlp.*", "calibrate.include", ("*.mlp.*",)),
        ("calibrate.include=['a*', b]", "calibrate.include", ("a*", "b")),
        ("prehab.strength=auto", "prehab.strength", "auto"),
        ("prehab.strength=3", "prehab.strength", 3.0),
        ("prehab.guard=no", "prehab.guard", False),
        ("data.train_split=on", "data.train_split", "on"),
        ("data.delimiter=;", "data.delimiter", ";"),
        ("data.delimiter=null", "data.delimiter", None),
        ("revision=1234567", "revision", "1234567"),
        ("adapter=a=b", "adapter", "a=b"),
    ],
)
def test_a_setting_is_read_as_yaml(text, path, value):
    assert read_setting(text) == (path, value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("truncate.floor_share", "sets nothing: give KEY=VALUE"),
        ("truncate.floorshare=0.2", "unknown option truncate.floorshare; did you mean truncate.floor_share?"),
        ("truncate={ratio: 0.5}", "truncate is a section: set its options one by one, such as truncate.ratio=VALUE"),
        ("truncate.ratio=half", "truncate.ratio: expected a number, found 'half'"),
        ("bench.rounds=[3]", "bench.rounds: expected a whole number, found [3]"),
        ("bench.rounds=", "bench.rounds: expected a whole number, found None"),
    ],
)
def test_a_setting_that_sets_nothing_is_refused(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read_setting(text)


def test_options_come_back_from_yaml_as_they_were(tmp_path):
    config = everything()
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert from_dict(RunConfig, read_options(tmp_path / "run.yaml")) == config


# Which verb has which options


def everything() -> RunConfig:
    """A run of which every stage is wanted."""
    steps = TrainConfig(steps=4)
    return RunConfig(
        "model",
        "text-generation",
        DataConfig("data"),
        adapter="adapter",
        prehab=PrehabConfig(train=steps),
        refine=RefineConfig(RefineSchedule(steps=4), block_steps=4),
        rehab=RehabConfig(train=steps),
        quantize=("int8",),
        ort=True,
    )


# A value that is not the default, of those that have no other way to find one.
OTHER = {
    "task": "text-classification",
    "device": "cuda",
    "max_memory": "16GB",
    "precision": "bfloat16",
    "dtype": "float16",
    "dense_graph": "never",
    "kv_cache": "latent",
    "calibrate.labels": "model",
    "prehab.surrogate": "nuclear",
    "prehab.schedule": "warmup",
    "prehab.whitening": "activation",
    "prehab.update": "gradient",
    "prehab.layer_weights": "fisher",
    "truncate.budget": "latency:0.5",
    "truncate.objective": "activation",
    "truncate.allocation": "uniform",
    "rehab.method": "lora",
    "quantize": ("int4",),
    "bench.provider": "xnnpack",
    "data.encoding": "cp1252",
    "data.delimiter": ";",
    "data.window_start": "bos",
}


def other_value(path: str):
    key = known_keys()[path]
    value = flat(asdict(everything()))[path]
    if path in OTHER:
        return OTHER[path]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 3
    if isinstance(value, float):
        return value / 2 if value else 0.25
    return {"str": "other", "int": 7, "float": 0.5, "bool": True}[re.findall(r"str|int|float|bool", str(key.kind))[0]]


def first_stage(path: str) -> str | None:
    """The first stage that another value of this option changes; every stage starts from model and data."""
    if path.startswith("data.") or path in ("model", "task", "adapter", "revision", "trust_remote_code", "seed"):
        return "merge"
    base, value = everything(), other_value(path)
    value = (value,) if "tuple" in str(known_keys()[path].kind) and not isinstance(value, tuple) else value
    changed = from_dict(RunConfig, with_value(asdict(base), path, value))
    assert changed != base, path
    for stage in DEPENDENCIES.values():
        before, after = (stage.options(config) if stage.is_enabled(config) else None for config in (base, changed))
        if before != after:
            return stage.name
    return None


# Shown to verbs before the first stage that they change, and why.
EARLIER = {
    "precision",  # in which calibration runs
    "device",  # changes rounding only
    "max_memory",  # as well
    "bench.threads",  # of all that is computed
    "ort",  # with it, export goes on to the stage of that name
    "min_speedup",  # is judged as soon as the bench is done
    "truncate.budget",  # times of layers come before prehab, and only with a budget of latency
}


def test_every_flag_stands_with_the_first_stage_that_it_changes():
    order = list(DEPENDENCIES)
    for flag in FLAGS:
        first = first_stage(flag.path)
        if flag.path in EARLIER:
            assert first is None or first == "times" or order.index(flag.stage) <= order.index(first), flag
        else:
            assert flag.stage == first, flag


def spellings(verb: str) -> set[str]:
    return {name for parameter in cli.commands[verb].params for name in (*parameter.opts, *parameter.secondary_opts)}


def test_a_verb_has_the_options_of_the_stages_through_its_own():
    before: set[str] = set()
    for verb in STAGE_VERBS:
        own = {flag.path for flag in flags_through(verb.until)}
        assert before <= own
        assert own >= {flag.path for flag in FLAGS if flag.title in verb.titles}
        before = own if verb.name not in ("export", "verify") else before
    assert {flag.spelling.split("/")[0] for flag in FLAGS} <= spellings("run")
    assert "--ratio" not in spellings("calibrate")
    assert {"--include", "--data", "--device"} <= spellings("calibrate")
    assert {"--ratio", "--prehab-steps"} <= spellings("truncate")
    assert "--quantize" in spellings("truncate")  # int4 asks for ranks in whole blocks
    assert not {"--rehab-steps", "--bench-batch", "--dtype"} & spellings("truncate")
    assert {"--bench-batch", "--quantize", "--target"} <= spellings("bench")


def test_sweep_and_fit_have_what_they_use():
    assert {"--ratio", "--method", "--refine-steps", "--rank-multiple"} <= spellings("sweep")
    assert not {"--objective", "--budget", "--prehab-steps", "--bench-batch", "--force", "--quantize"} & spellings(
        "sweep"
    )
    assert {"--p95", "--quantize", "--bench-length", "--kv-cache", "--drift-correction"} <= spellings("fit")
    assert not {"--ratio", "--objective", "--refine-steps", "--rehab-steps", "--ort", "--provider"} & spellings("fit")


def test_knobs_have_no_flag_and_no_two_flags_one_name():
    paths = [flag.path for flag in FLAGS]
    assert len(paths) == len(set(paths))
    assert not set(KNOBS) & set(paths)
    assert set(paths) <= set(known_keys())
    assert len(flag_paths()) == sum(len(flag.names) for flag in FLAGS)


@pytest.mark.parametrize("verb", ["", *cli.commands])
def test_help_is_in_titled_groups_and_loads_nothing_heavy(verb):
    script = (
        "import sys\nfrom prehab_export.cli import main\n"
        f"try:\n    main({[verb, '--help'] if verb else ['--help']!r})\nexcept SystemExit:\n    pass\n"
        "libraries = {'torch', 'transformers', 'onnxruntime', 'onnx', 'datasets', 'numpy', 'yaml', 'rich'}\n"
        "heavy = libraries & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: prehab-export" in done.stdout
    titles = re.findall(r"^(\S.*):$", done.stdout, re.MULTILINE)
    if verb in ("run", "truncate", "bench", "fit", "sweep"):
        assert {"Folder and options", "Model", "Data", "Truncation"} <= set(titles)
        assert "Examples:" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_the_list_of_options_is_whole(capsys):
    assert invoke("options") == 0
    told = capsys.readouterr().out
    for path in known_keys():
        assert re.search(rf"^  {re.escape(path)}\s", told, re.MULTILINE), path
    assert "(--prehab-lambda)" in told
    assert invoke("options", "floor", "SHARE") == 0
    told = capsys.readouterr().out
    assert "truncate.floor_share" in told
    assert "prehab.update" not in told
    assert invoke("options", "--json") == 0
    rows = {row["path"]: row for row in yaml.safe_load(capsys.readouterr().out)}
    assert set(rows) == set(known_keys())
    assert (rows["truncate.ratio"]["flag"], rows["truncate.ratio"]["default"]) == ("--ratio", 0.6)
    assert rows["truncate.floor_share"]["flag"] is None
    assert invoke("options", "zzz") == 2
    assert "no option" in capsys.readouterr().err


# Options of other programs, which are named in this one's code.
FOREIGN = {"--no-memory", "--no-deps", "--dest"}


def test_every_flag_that_is_named_anywhere_is_there():
    known = {"--help", "--version"}.union(*(spellings(verb) for verb in cli.commands))
    for package in ("converters", "prehab_export"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if "targets" in path.parts:  # command lines of ssh, adb and browsers
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", node.value))
                    assert named <= known | FOREIGN, f"{path.name}:{node.lineno}"
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for line in page.read_text(encoding="utf-8").splitlines():
            if page.name == "README.md" or "prehab-export " in line:
                assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", line)) <= known | FOREIGN, f"{page.name}: {line}"


def test_every_key_that_is_named_with_set_is_there():
    folders = ("prehab_export", "converters", "benchmarks", "tests")
    code = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for path in (*code, ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        if path.name != "test_cli.py":
            for name in re.findall(r"--set ([a-z_.]+)=", path.read_text(encoding="utf-8")):
                assert name in known_keys(), f"{path.name}: {name}"


# What a command line makes of it all


@pytest.fixture
def asked(monkeypatch):
    """What the pipeline is asked to do, instead of doing it."""
    import prehab_export.pipeline as pipeline

    seen: list[RunConfig] = []

    def run(config, output, *, until, redo):
        seen.append(config)
        output.mkdir(parents=True, exist_ok=True)
        (output / "run.yaml").write_text(to_yaml(config))
        raise InputError("that is all")

    monkeypatch.setattr(pipeline, "run", run, raising=False)
    return seen


BASE = ["model", "--task", "text-generation", "--data", "data.txt"]


def test_flags_and_settings_win_over_yaml_and_yaml_over_what_is_saved(asked, tmp_path):
    invoke("truncate", *BASE, "-o", tmp_path, "--ratio", "0.3", "--set", "truncate.floor_share=0.3", "--seed", "3")
    file = tmp_path / "options.yaml"
    file.write_text("truncate: {ratio: 0.4, floor_share: 0.4}\n")
    invoke("truncate", tmp_path, "--config", file, "--set", "truncate.floor_share=0.5")
    last = asked[-1]
    assert (last.seed, last.truncate.ratio, last.truncate.floor_share) == (3, 0.4, 0.5)
    invoke("truncate", tmp_path, "--config", file, "--ratio", "0.6", "--set", "truncate.objective=weight")
    assert (asked[-1].truncate.ratio, asked[-1].truncate.objective) == (0.6, "weight")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--ratio", "0.5", "--set", "truncate.ratio=0.5"], "truncate.ratio is given both by --ratio and by --set"),
        (["--no-ort", "--set", "ort=true"], "ort is given both by --ort and by --set"),
        (["--set", "model=other"], "model is given both by MODEL and by --set"),
        (["--set", "seed=1", "--set", "seed=2"], "--set gives seed twice"),
        (["--set", "prehab.lambda=3"], "unknown option prehab.lambda; did you mean prehab.strength?"),
        (["--set", "ratio=0.5"], "unknown option ratio; did you mean truncate.ratio?"),
        (["--set", "prehab.update=sideways"], "prehab.update must be one of gradient, proximal"),
        (["--unset", "quantise"], "did you mean quantize?"),
        (["--unset", "truncate.ration"], "did you mean truncate.ratio?"),
        (["--unset", ""], "--unset"),
    ],
)
def test_what_contradicts_itself_or_means_nothing_is_refused(asked, given, message, tmp_path, capsys):
    assert invoke("run", *BASE, "-o", tmp_path, *given) == 2
    assert message in capsys.readouterr().err
    assert not asked


@pytest.mark.parametrize(
    ("verb", "flag", "advice"),
    [
        ("run", "--prehab-update", "--set prehab.update=VALUE"),
        ("run", "--bench-rounds", "--set bench.rounds=VALUE"),
        ("run", "--no-quantize-refit", "--set quantize_refit=VALUE"),
        ("calibrate", "--ratio", "calibrate does not depend on it; --set truncate.ratio=VALUE"),
        ("truncate", "--min-speedup", "--set min_speedup=VALUE"),
        ("run", "--rtio", "--ratio"),
    ],
)
def test_a_flag_that_a_verb_does_not_have_is_refused_with_a_way(verb, flag, advice, tmp_path, capsys):
    assert invoke(verb, *BASE, "-o", tmp_path, flag, "1") == 2
    assert advice in capsys.readouterr().err


def test_keys_flags_and_sections_are_taken_back(asked, tmp_path):
    given = ["--quantize", "int8", "--ratio", "0.3", "--set", "truncate.floor_share=0.3", "--prehab-steps", "4"]
    given += ["--set", "prehab.update=gradient", "--refine-steps", "5", "--eval-samples", "9"]
    invoke("run", *BASE, "-o", tmp_path, *given)
    invoke("run", tmp_path, "--unset", "quantize", "--unset", "truncate.floor_share", "--unset", "prehab")
    last, default = asked[-1], RunConfig("", "text-generation", DataConfig(""))
    assert last.quantize == ()
    assert last.truncate == replace(default.truncate, ratio=0.3)
    assert last.prehab == default.prehab
    assert (last.refine.schedule.steps, last.data.eval_samples) == (5, 9)
    invoke("run", tmp_path, "--unset", "truncate", "--unset", "refine.schedule", "--unset", "--eval-samples")
    assert (asked[-1].truncate, asked[-1].refine, asked[-1].data.eval_samples) == (
        default.truncate,
        default.refine,
        None,
    )


def test_what_a_run_cannot_do_without_cannot_be_taken_back(asked, tmp_path, capsys):
    invoke("run", *BASE, "-o", tmp_path)
    for name, way in (("task", "--task"), ("data", "--data"), ("data.data", "--data"), ("model", "MODEL")):
        assert invoke("run", tmp_path, "--unset", name) == 2
        assert f"{way} is missing" in capsys.readouterr().err
    assert len(asked) == 1


def test_a_new_run_of_a_model_forgets_what_was_saved_and_a_stage_does_not(asked, tmp_path):
    invoke("run", *BASE, "-o", tmp_path, "--ratio", "0.3")
    invoke("truncate", *BASE, "-o", tmp_path)
    assert asked[-1].truncate.ratio == 0.3
    invoke("run", "-o", tmp_path)
    assert asked[-1].truncate.ratio == 0.3
    invoke("run", *BASE, "-o", tmp_path)
    assert asked[-1].truncate.ratio == 0.6


def test_the_options_of_one_run_are_those_of_another_folder(vit_folder, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    given = ["--set", "truncate.floor_share=0.2", "--set", "quantize=[int8]", "--set", "bench.batch_sizes=[1, 8]"]
    assert invoke("calibrate", *vit_options(vit_folder), "-o", first, *given) == 0
    assert invoke("calibrate", "--config", first / "run.yaml", "-o", second) == 0
    assert (second / "run.yaml").read_text() == (first / "run.yaml").read_text()
    keys = [sorted(path.name for path in folder.glob("stages/*/*")) for folder in (first, second)]
    assert keys[0] == keys[1]
    third = tmp_path / "third"
    third.mkdir()
    (third / "o.yaml").write_text((first / "run.yaml").read_text().replace("floor_share", "flor_share"))
    assert invoke("calibrate", "--config", third / "o.yaml", "-o", third / "out") == 2
    error = capsys.readouterr().err
    assert f"unknown option truncate.flor_share in {third / 'o.yaml'}; did you mean truncate.floor_share?" in error


def test_the_module_runs_too():
    command = [sys.executable, "-m", "prehab_export", "options"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "truncate.ratio" in done.stdout
