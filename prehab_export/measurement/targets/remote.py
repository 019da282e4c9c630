"""A kit on another machine: copied there as far as it is not there yet, run, its results fetched, and taken away."""

import json
import shlex
import tempfile
from contextlib import suppress
from pathlib import Path, PurePosixPath

from prehab_export.measurement.targets.kit import KIT, RUNNER, Kit
from prehab_export.measurement.targets.results import Json, read_results
from prehab_export.measurement.targets.rounds import follow, rounds_of
from prehab_export.measurement.targets.shell import Shell
from prehab_export.system import ParityError, Progress, TargetError, silent, step

# Prints the hash of every file below a folder; runs there.
_HASHES = """
import sys
sys.path = [entry for entry in sys.path if entry]
import hashlib, json, os
found = {}
for folder, _, names in os.walk(sys.argv[1]):
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isfile(path) and not os.path.islink(path):
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
            found[os.path.relpath(path, sys.argv[1])] = digest.hexdigest()
print(json.dumps(found))
"""

# As in the hashes: where the shell happens to stand is no place to import from.
_NEEDED = "import sys; sys.path = [p for p in sys.path if p]; import numpy, onnxruntime; print(onnxruntime.__version__)"

# An exit code of the runner.
_OUT_OF_TOLERANCE = 3
# What a shell makes of a process that SIGKILL has ended.
_KILLED = 137


def measure_remotely(
    kit: Kit,
    shell: Shell,
    place: str,
    python: str = "python3",
    keep: bool = False,
    progress: Progress = silent,
) -> Json:
    """The results of a kit's runner on the machine behind ``shell``.

    Args:
        python: the interpreter there; it needs onnxruntime and numpy.
        keep: leave the kit there, so that the next time only what has changed is copied.

    Raises:
        TargetError: no Python or runtime there, no room, the connection is lost, or the runner fails.
        ParityError: a model gives other answers there.
    """
    _check_python(shell, python)
    folder = f"{shell.home}/{kit.digest[:16]}" if not keep else f"{shell.home}/kept"
    try:
        _copy(kit, shell, folder, python, progress)
        results = f"{folder}/results-{kit.digest[:16]}.json"
        line = (
            f"{shlex.quote(python)} {shlex.quote(f'{folder}/{RUNNER}')} --end-with-stdin --place {place} "
            f"--out {shlex.quote(results)}"
        )
        with progress(f"measure at {shell.name}", rounds_of(kit)) as advance:
            code, _, errors = shell.run(line, follow(advance))
        if code == _OUT_OF_TOLERANCE:
            raise ParityError(f"{shell.name}: {_error_of(errors)}")
        if code == _KILLED:
            raise TargetError(f"{shell.name}: the runner was killed there, most likely for want of memory")
        if code != 0:
            raise TargetError(f"{shell.name}: {_error_of(errors)}")
        with tempfile.TemporaryDirectory() as own:
            fetched = Path(own, "results.json")
            shell.get(results, fetched)
            return read_results(fetched, kit.digest)
    finally:
        if not keep:
            _remove(shell, folder)


def _check_python(shell: Shell, python: str) -> None:
    code, _, errors = shell.run(f"{shlex.quote(python)} -c {shlex.quote(_NEEDED)}")
    if code != 0 and "Error" in errors:
        raise TargetError(
            f"{shell.name}: {errors.strip().splitlines()[-1]}; install what a kit needs there: {python} -m pip install "
            "onnxruntime numpy"
        )
    if code != 0:
        raise TargetError(
            f"{shell.name} has no {python}; name one with --python, or measure without it as the kit's README says"
        )


def _copy(kit: Kit, shell: Shell, folder: str, python: str, progress: Progress) -> None:
    quoted = shlex.quote(folder)
    code, found, errors = shell.run(f"mkdir -p {quoted} && {shlex.quote(python)} -c {shlex.quote(_HASHES)} {quoted}")
    if code != 0:
        raise TargetError(f"{shell.name}: {folder} cannot be made there: {_error_of(errors)}")
    there = json.loads(found)
    wanted = {name: facts["sha256"] for name, facts in kit.facts["files"].items()} | {KIT: kit.digest}
    missing = [name for name, digest in wanted.items() if there.get(name) != digest]
    folders = sorted({str(PurePosixPath(folder, name).parent) for name in missing})
    stale = [name for name in there if name not in wanted]
    line = " && ".join(
        [
            *(f"mkdir -p {shlex.quote(parent)}" for parent in folders),
            *(f"rm -f {shlex.quote(f'{folder}/{name}')}" for name in stale),
            "true",
        ]
    )
    shell.run(line)
    with progress(f"copy to {shell.name}", len(missing)) as advance:
        for name in missing:
            with step(advance, name):
                shell.put(kit.folder / name, f"{folder}/{name}")


def _remove(shell: Shell, folder: str) -> None:
    with suppress(TargetError):  # nothing can be tidied over a lost connection, and that has been said already
        shell.run(f"rm -rf {shlex.quote(folder)}")


def _error_of(errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return said[-1] if said else lines[-1] if lines else "it ended without a word"
