"""Other programs, Python first of all: started so that none runs what lies in the current folder, none outlives us, and
none needs more of the system than it has. Everything that starts a process starts it through here."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

import converters
import prehab_export
from prehab_export.system.current_folder import without_current_folder

_PR_SET_PDEATHSIG = 1

# The number of SIGKILL, which Windows has no name for.
KILLED = 9

# Runs a module of ours with the very packages that this process has, wherever they were found: neither the current
# folder nor another copy of them stands in. ``-P`` keeps the current folder out of everything else.
_RUN_MODULE = """
import runpy, sys
from importlib.util import module_from_spec, spec_from_file_location
for name, file in {packages!r}:
    spec = spec_from_file_location(name, file)
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def python_module(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of this project in a Python of its own."""
    packages = [(package.__name__, str(package.__file__)) for package in (converters, prehab_export)]
    return [*_python(), "-c", _RUN_MODULE.format(packages=packages), module, *arguments]


def python_script(script: Path, *arguments: str) -> list[str]:
    """The command line that runs a file in a Python of its own, which does not import from the file's folder."""
    return [*_python(), str(script), *arguments]


def _python() -> list[str]:
    inherited = (("-E", sys.flags.ignore_environment), ("-s", sys.flags.no_user_site))
    return [sys.executable, "-P", *(flag for flag, given in inherited if given)]


def environment(**more: str) -> dict[str, str]:
    """This process's environment for a child: no place in it means the current folder. Children speak UTF-8."""
    return without_current_folder({**os.environ, "PYTHONUTF8": "1", **more})


def find_program(name: str) -> str | None:
    """Where a program lies, as an absolute path; None where it is not. Only a name with a folder in it may mean the
    current one."""
    path = environment().get("PATH", os.defpath)
    found = shutil.which(name) if os.path.dirname(name) else shutil.which(name, path=path)
    if found is None or not (os.path.isabs(found) or os.path.dirname(name)):
        return None  # Windows looks into the current folder before all others
    return os.path.abspath(found)


def dies_with_us() -> Callable[[], None] | None:
    """What a child calls between fork and exec, so that the kernel ends it when the thread that started it is gone,
    killed without a word included (prctl(2)). None but on Linux."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)  # loaded here: between fork and exec hardly anything is safe

    def prepare() -> None:
        library.prctl(_PR_SET_PDEATHSIG, KILLED)

    return prepare


def end_with_all_of_it(process: subprocess.Popen) -> None:
    """End a child that leads a session of its own, and whatever it has started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
    process.wait()
