"""Child processes: what lies in the current folder is never run, and a system without POSIX is no obstacle."""

import importlib
import json
import os
import subprocess
import sys
import textwrap
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import psutil
import pytest
from test_bench import QUICK as QUICK_BENCH
from test_bench import vision
from test_pipeline import vit_options

import prehab_export
from converters.errors import InputError
from prehab_export.config.bench import BenchConfig
from prehab_export.config.data import DataConfig
from prehab_export.inputs.data.source import open_source
from prehab_export.measurement.benchmark import bench
from prehab_export.measurement.targets.kit import make_kit
from prehab_export.measurement.targets.limits import Limits, run_limited
from prehab_export.measurement.targets.local import measure_locally
from prehab_export.measurement.targets.remote import _HASH_SCRIPT, _IMPORTS
from prehab_export.system.children import find_program, kill_process_tree, python_module
from prehab_export.system.current_folder import leave_current_folder, without_current_folder

TRAPS = (
    *(
        "sitecustomize",
        "usercustomize",
        "random",
        "json",
        "typing",
        "re",
        "string",
        "subprocess",
        "tempfile",
        "logging",
    ),
    *("click", "yaml", "numpy", "torch", "onnxruntime", "onnx", "transformers", "datasets", "psutil", "matplotlib"),
    *("flash_attn", "tensorflow", "converters", "bench_worker", "kernel_cost"),
)


@pytest.fixture
def trapped(tmp_path, monkeypatch):
    """Stand in a folder of modules that tell when they are run; the fixture is where they tell it."""
    marker, folder = tmp_path / "was-run", tmp_path / "downloaded-model"
    folder.mkdir()
    for name in TRAPS:
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write('{name} ')\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    return marker


def python_path(*more: str) -> str:
    """PYTHONPATH as it is, or where this package lies, with further entries."""
    given = os.environ.get("PYTHONPATH") or str(Path(prehab_export.__file__).parents[1])
    return os.pathsep.join([*more, given])


def said(marker: Path) -> str:
    return marker.read_text(encoding="utf-8") if marker.exists() else ""


def test_the_traps_work(trapped):
    subprocess.run([sys.executable, "-c", "import random"], check=True, env={**os.environ, "PYTHONPATH": ""})
    assert "random" in said(trapped)


def test_the_program_itself(trapped):
    """``python -m`` has put the folder first on its path before any of our code is there."""
    command = [sys.executable, "-m", "prehab_export", "run", "nowhere", "-o", "out", "--task", "text-generation"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": python_path()}, capture_output=True, text=True)
    assert (done.returncode, said(trapped)) == (2, ""), done.stderr
    command = [sys.executable, "-m", "prehab_export.measurement.worker"]  # asked nothing, it ends
    subprocess.run(command, env={**os.environ, "PYTHONPATH": python_path()}, stdin=subprocess.DEVNULL, check=True)
    assert said(trapped) == ""


def test_the_script_under_an_empty_entry_of_the_path(trapped, tmp_path):
    """What Python itself loads as it starts is loaded before any code of ours; what we load, and ours load, is not."""
    for trap in Path.cwd().glob("*.py"):
        if trap.stem not in ("random", "json", "click", "yaml", "numpy", "torch", "transformers", "datasets", "psutil"):
            trap.unlink()
    script = tmp_path / "prehab-export"
    script.write_text("from prehab_export.cli import main\nmain()\n", encoding="utf-8")
    command = [sys.executable, script, "run", "nowhere", "-o", "out", "--task", "text-generation", "--data", "nowhere"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": python_path("")}, capture_output=True, text=True)
    assert (done.returncode, said(trapped)) == (2, ""), done.stderr


@pytest.mark.parametrize("entries", ["", ".", f".{os.pathsep}", "lib"], ids=["empty", "dot", "both", "relative"])
def test_entries_of_the_path_that_mean_the_current_folder(trapped, tmp_path, monkeypatch, entries):
    """A shell that says PYTHONPATH=$PYTHONPATH:… leaves an empty entry where nothing was set."""
    (Path.cwd() / "lib").mkdir()
    for trap in list(Path.cwd().glob("*.py")):
        (Path.cwd() / "lib" / trap.name).write_bytes(trap.read_bytes())
    monkeypatch.setenv("PYTHONPATH", python_path(entries))
    assert bench({"m": vision(tmp_path / "m.onnx")}, BenchConfig(**QUICK_BENCH))["cases"]
    assert said(trapped) == ""


def test_a_kit_and_its_children(trapped, tmp_path, monkeypatch):
    kit = make_kit({"m": vision(tmp_path / "m.onnx")}, tmp_path / "kit", BenchConfig(**QUICK_BENCH))
    monkeypatch.setenv("PYTHONPATH", python_path(""))
    results = measure_locally(kit, Limits())
    assert results["cases"][0]["peak_mb"] > 1  # told by a child of the kit's own
    assert said(trapped) == ""


@pytest.mark.parametrize("code", [_HASH_SCRIPT, _IMPORTS], ids=["hashes", "needed"])
def test_what_is_asked_of_another_machine(trapped, code):
    for name in ("sitecustomize", "usercustomize"):
        Path(f"{name}.py").unlink()
    subprocess.run([sys.executable, "-c", code, "."], check=True, stdout=subprocess.DEVNULL)
    assert said(trapped) == ""


def test_children_have_the_packages_of_their_parent(trapped, tmp_path):
    """Not those that the current folder, or another installation, has under the same names."""
    code = "import sys, converters, prehab_export; print(converters.__file__, prehab_export.__file__, sys.argv[1:])"
    (tmp_path / "told").mkdir()
    (tmp_path / "told" / "module_that_tells.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "told")}
    command = python_module("module_that_tells", "one", "two")
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    converters = importlib.import_module("converters")
    assert told.split(maxsplit=2)[:2] == [converters.__file__, prehab_export.__file__]
    assert told.split(maxsplit=2)[2].strip() == "['one', 'two']"
    assert said(trapped) == ""


def test_data_is_no_program(trapped):
    """A folder that bears the name of a data set on the hub, with a loading script in it."""
    Path("glue").mkdir()
    for name in ("glue.py", "dataset.py", "__init__.py"):
        Path("glue", name).write_text(f"open({str(trapped)!r}, 'a').write('glue')\n", encoding="utf-8")
    with pytest.raises(InputError, match="scripts"):
        open_source(DataConfig("glue"))
    Path("glue", "train.csv").write_text("text,label\nfine,1\npoor,0\n", encoding="utf-8")
    with suppress(InputError):  # `datasets` may refuse the folder for its script; it must not run it
        open_source(DataConfig("glue"))
    assert said(trapped) == ""


def test_programs_are_not_looked_for_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("npm", "bin/npm"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("#!/bin/sh\n", encoding="utf-8")
        Path(name).chmod(0o755)
    for path in ("", ".", "bin", f".{os.pathsep}bin{os.pathsep}"):
        monkeypatch.setenv("PATH", path)
        assert find_program("npm") is None
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_program("npm") == str(tmp_path / "bin" / "npm")
    assert find_program("./npm") == str(tmp_path / "npm")  # asked for by its place


def test_what_the_user_chose_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absolute = str(tmp_path / "chosen")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([absolute, "relative", ""]))
    monkeypatch.setenv("PATH", os.pathsep.join(["relative", absolute]))
    monkeypatch.setattr(sys, "path", [absolute, str(tmp_path / "relative"), str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", ["prehab-export"])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    before = list(sys.path)
    leave_current_folder()
    assert sys.path == [entry for entry in before if entry not in (str(tmp_path / "relative"), str(tmp_path), "")]
    assert os.environ["PYTHONPATH"] == os.environ["PATH"] == absolute
    assert without_current_folder({})["PYTHONSAFEPATH"] == "1"


# ---- systems that lack what POSIX has

BARE = """
    import builtins, os, signal, types

    # Only from our own code, and the library that locks for us: others rightly ask what system this is.
    OURS = ("prehab_export", "converters", "filelock", "__main__")
    HIDDEN = ("fcntl", "resource", "pwd", "grp", "termios", "readline")
    LACKING = {
        "os": ("killpg", "getpgid", "setsid", "fork", "sched_getaffinity", "sched_setaffinity", "getuid", "geteuid",
               "uname", "getloadavg"),
        "signal": ("SIGHUP", "SIGKILL", "SIGALRM", "setitimer"),
    }

    def bare(module, lacking):
        copy = types.ModuleType(module.__name__)
        vars(copy).update({name: value for name, value in vars(module).items() if name not in lacking})
        return copy

    copies = {module.__name__: bare(module, LACKING[module.__name__]) for module in (os, signal)}
    original = builtins.__import__

    def replaced(name, globals=None, locals=None, fromlist=(), level=0):
        if level == 0 and ((globals or {}).get("__name__") or "").split(".")[0] in OURS:
            if name in HIDDEN:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in copies:
                return copies[name]
        return original(name, globals, locals, fromlist, level)

    builtins.__import__ = replaced
"""


def test_the_bare_system_is_bare(bare):
    code = """
        import os, signal
        assert not hasattr(os, "killpg") and not hasattr(signal, "SIGHUP")
        try:
            import resource
        except ImportError:
            print("bare")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=bare, capture_output=True, text=True)
    assert done.stdout == "bare\n", done.stderr


@pytest.fixture
def bare(tmp_path):
    """The environment of a Python, and of all that it starts, on a system that has none of these."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(BARE), encoding="utf-8")
    return {**os.environ, "PYTHONPATH": python_path(str(folder)), "PYTHONIOENCODING": "cp1252", "LC_ALL": "C"}


def test_all_modules_import_on_a_bare_system(bare):
    code = """
        import importlib, pkgutil, converters, prehab_export
        for package in (converters, prehab_export):
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                if not module.name.endswith("__main__"):
                    importlib.import_module(module.name)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=bare, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_run_on_a_bare_system_in_a_folder_of_traps(bare, trapped, vit_folder, tmp_path):
    """Every stage up to the process that verifies. Ten seconds and more: two processes that import all there is."""
    command = [sys.executable, "-m", "prehab_export", "verify", *map(str, vit_options(vit_folder))]
    done = subprocess.run([*command, "-o", tmp_path / "run"], env=bare, capture_output=True, encoding="cp1252")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "artifact" / "onnx" / "model.onnx").is_file()
    assert said(trapped) == ""


def test_a_bench_on_a_bare_system(bare, tmp_path):
    code = """
        import sys
        from prehab_export.measurement.worker_process import WorkerProcess
        case = {"threads": 1, "batch": 1, "sequence": None, "new_tokens": 1, "vocab_size": None}
        with WorkerProcess("m", 60) as worker:
            request = {"model": sys.argv[1], "provider": "CPUExecutionProvider", "case": case}
            print(worker.ask(action="load", sample_memory=True, **request)["peak_resident_mb"] > 1)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(vision(tmp_path / "m.onnx"))]
    done = subprocess.run(command, env=bare, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def test_letters_that_the_terminal_lacks(bare):
    """A figure with ≈ is no reason to fail where the terminal has another alphabet."""
    code = """
        import click
        from prehab_export.cli import main
        from prehab_export.cli.commands import cli
        from prehab_export.system.terminal import result_console, say

        @cli.command()
        def tell():
            say("λ")
            result_console().print("≈")
            click.echo("λ ≈ ×")

        main(["tell"])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=bare, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("cp1252").split()[-1] == "×"


def test_a_kit_on_a_bare_system(bare, tmp_path):
    kit = make_kit({"m": vision(tmp_path / "m.onnx")}, tmp_path / "kit", BenchConfig(**QUICK_BENCH))
    command = [sys.executable, str(kit.folder / "run_kit.py"), "--out", str(tmp_path / "results.json")]
    done = subprocess.run(command, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["cases"]


def test_limits_that_a_system_lacks_are_refused(bare):
    code = """
        from converters.errors import InputError
        from prehab_export.measurement.targets.limits import Limits, run_limited
        import sys
        for limits in ({"memory_mb": 100}, {"cores": (0,)}):
            try:
                Limits(**limits)
            except InputError as error:
                print(error)
        print(run_limited([sys.executable, "-c", "print('ran')"], Limits()).output)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=bare, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "without --memory-limit" in done.stdout
    assert "without --pin-cores" in done.stdout
    assert "ran" in done.stdout


def test_nothing_is_called_in_a_child_but_on_linux(monkeypatch):
    """Windows' Python refuses a ``preexec_fn``."""
    given = []
    monkeypatch.setattr(sys, "platform", "win32")

    def start(*_, **options):
        given.append(options["preexec_fn"])
        raise subprocess.SubprocessError

    monkeypatch.setattr(subprocess, "Popen", start)
    run_limited(["anything"], Limits())
    assert given == [None]


@pytest.mark.parametrize("groups", [True, False], ids=["process groups", "none"])
def test_a_child_ends_with_all_that_it_started(monkeypatch, groups):
    if not groups:
        monkeypatch.delattr(os, "killpg")
    inner = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {inner!r}]); print(1, flush=True); {inner}"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline()
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) == 1
    kill_process_tree(process)
    process.stdout.close()
    assert process.poll() is not None
    assert not psutil.wait_procs(started, timeout=30)[1]


def test_the_kit_runner_is_of_python_3_8():
    """It is read by the grammar of 3.8, and imports what every Python has, onnxruntime and numpy."""
    import ast

    tree = ast.parse(files("prehab_export.measurement.targets").joinpath("kit_runner.py").read_text(encoding="utf-8"),
                     feature_version=(3, 8))  # fmt: skip
    names = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert names <= set(sys.stdlib_module_names) - {"fcntl", "resource", "pwd", "grp"} | {"numpy", "onnxruntime"}
