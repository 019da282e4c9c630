"""The current folder is data, not code: people stand in folders that they have downloaded.

Started with ``-m``, Python imports from the current folder before all others; an empty or relative entry of PYTHONPATH
means it too, and one of PATH does the like for programs. A ``random.py`` that lies beside a model would then be run in
place of Python's own. This module imports nothing but what Python has loaded before it looks at any folder.
"""

import os
import sys

# The folder of this package; this module lies in a room of it.
_PACKAGE_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PACKAGE = os.path.basename(_PACKAGE_FOLDER)


def is_the_program() -> bool:
    """Whether this process is the command line of this package, rather than a program that imports it."""
    if sys.argv[:1] == ["-m"]:  # Python's name for a module that it has not found yet
        return any(argument.removeprefix("-m").split(".")[0] == _PACKAGE for argument in sys.orig_argv[1:])
    return bool(sys.argv) and os.path.basename(sys.argv[0]).split(".")[0] == _PACKAGE.replace("_", "-")


def leave_current_folder() -> None:
    """Take the current folder away from where this process, and whatever it starts, looks for code.

    Of a copy that is not installed the folder of this package stays, but last: what Python or its installed packages
    have wins.
    """
    own, before = os.path.dirname(_PACKAGE_FOLDER), list(sys.path)
    given = "" if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "")
    entries = given.split(os.pathsep) if given else []
    meant = {os.path.abspath(entry) for entry in entries if not os.path.isabs(entry)}
    meant -= {os.path.abspath(entry) for entry in entries if os.path.isabs(entry)}
    if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
        del sys.path[0]
    sys.path[:] = [entry for entry in sys.path if entry and os.path.abspath(entry) not in meant]
    if own in before and own not in sys.path:
        sys.path.append(own)
    os.environ |= without_current_folder(os.environ)


def without_current_folder(environment: "os._Environ[str] | dict[str, str]") -> dict[str, str]:
    """An environment in which neither Python nor a search for a program looks into the current folder.

    >>> without_current_folder({"PATH": f"bin{os.pathsep}{os.sep}usr", "PYTHONPATH": ""})["PATH"] == f"{os.sep}usr"
    True
    """
    paths = {
        name: os.pathsep.join(entry for entry in environment[name].split(os.pathsep) if os.path.isabs(entry))
        for name in ("PATH", "PYTHONPATH")
        if name in environment
    }
    return {**environment, **paths, "PYTHONSAFEPATH": "1"}
