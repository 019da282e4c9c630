"""Start other programs, mostly Python, safely: no child runs code from the current folder or outlives this process.

Every child process of this project is started through this module.
"""

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

# The number of SIGKILL, which has no name on Windows.
KILLED = 9

# Runs one of our modules with the same packages that this process uses, wherever they were found, so that neither the
# current folder nor another copy of them takes their place. ``-P`` keeps the current folder out of all other imports.
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
    """Return the command line that runs a module of this project in a new Python process."""
    packages = [(package.__name__, str(package.__file__)) for package in (converters, prehab_export)]
    return [*_python(), "-c", _RUN_MODULE.format(packages=packages), module, *arguments]


def python_script(script: Path, *arguments: str) -> list[str]:
    """Return the command line that runs a file in a new Python process, which does not import from the file's
    folder."""
    return [*_python(), str(script), *arguments]


def _python() -> list[str]:
    """This Python with the flags that a child inherits."""
    inherited = (("-E", sys.flags.ignore_environment), ("-s", sys.flags.no_user_site))
    return [sys.executable, "-P", *(flag for flag, is_set in inherited if is_set)]


def environment(**more: str) -> dict[str, str]:
    """Return the environment for a child process, with ``more`` variables: no entry refers to the current folder, and
    text is UTF-8."""
    return without_current_folder({**os.environ, "PYTHONUTF8": "1", **more})


def find_program(name: str) -> str | None:
    """Return the absolute path of a program, or None if it is not found. The current folder is only searched if the
    name itself contains a folder."""
    path = environment().get("PATH", os.defpath)
    program = shutil.which(name) if os.path.dirname(name) else shutil.which(name, path=path)
    if program is None or not (os.path.isabs(program) or os.path.dirname(name)):
        return None  # Windows searches the current folder before any other
    return os.path.abspath(program)


def die_with_parent() -> Callable[[], None] | None:
    """Return a ``preexec_fn`` for a child process that must not outlive this one; None on systems other than Linux.

    The kernel then kills the child when the thread that started it ends, even if that is killed (prctl(2)).
    """
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)  # loaded now, because hardly anything is safe between fork and exec

    def prepare() -> None:
        library.prctl(_PR_SET_PDEATHSIG, KILLED)

    return prepare


def kill_process_tree(process: subprocess.Popen) -> None:
    """Kill a child that leads its own session, and all processes that it has started."""
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
