"""Keep code in the current folder from running: users work in folders that they have downloaded.

Started with ``-m``, Python imports from the current folder before any other. An empty or relative entry of PYTHONPATH
also refers to it, and such an entry of PATH does the same for programs. A ``random.py`` beside a model would then run
instead of Python's own. This module only imports what Python has loaded before it searches any folder.
"""

import os
import sys

# The folder of the prehab_export package, two levels above this file.
_PACKAGE_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PACKAGE = os.path.basename(_PACKAGE_FOLDER)


def is_the_program() -> bool:
    """Whether this process is the package's command line, rather than a program that imports the package."""
    if sys.argv[:1] == ["-m"]:  # Python's placeholder until it has found the module
        return any(argument.removeprefix("-m").split(".")[0] == _PACKAGE for argument in sys.orig_argv[1:])
    return bool(sys.argv) and os.path.basename(sys.argv[0]).split(".")[0] == _PACKAGE.replace("_", "-")


def leave_current_folder() -> None:
    """Remove the current folder from the places where this process and its children look for code.

    If the package is a copy that is not installed, its folder stays on the path, but last: Python's own modules and
    installed packages take precedence.
    """
    package_parent, path_before = os.path.dirname(_PACKAGE_FOLDER), list(sys.path)
    python_path = "" if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "")
    entries = python_path.split(os.pathsep) if python_path else []
    relative = {os.path.abspath(entry) for entry in entries if not os.path.isabs(entry)}
    relative -= {os.path.abspath(entry) for entry in entries if os.path.isabs(entry)}
    if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
        del sys.path[0]
    sys.path[:] = [entry for entry in sys.path if entry and os.path.abspath(entry) not in relative]
    if package_parent in path_before and package_parent not in sys.path:
        sys.path.append(package_parent)
    os.environ |= without_current_folder(os.environ)


def without_current_folder(environment: "os._Environ[str] | dict[str, str]") -> dict[str, str]:
    """Return the environment without entries that make Python, or a search for a program, use the current folder.

    >>> without_current_folder({"PATH": f"bin{os.pathsep}{os.sep}usr", "PYTHONPATH": ""})["PATH"] == f"{os.sep}usr"
    True
    """
    paths = {
        name: os.pathsep.join(entry for entry in environment[name].split(os.pathsep) if os.path.isabs(entry))
        for name in ("PATH", "PYTHONPATH")
        if name in environment
    }
    return {**environment, **paths, "PYTHONSAFEPATH": "1"}
