"""Measurement of a kit on another machine: copy what is missing there, run it, fetch the results, and remove it."""

import json
import shlex
import tempfile
from contextlib import suppress
from pathlib import Path, PurePosixPath

from prehab_export.measurement.targets.kit import KIT, RUNNER, Kit
from prehab_export.measurement.targets.results import Json, read_results
from prehab_export.measurement.targets.rounds import count_rounds, follow
from prehab_export.measurement.targets.shell import Shell
from prehab_export.system import ParityError, Progress, TargetError, silent, step

# A script for the other machine, which prints the hash of every file below a folder.
_HASH_SCRIPT = """
import sys
sys.path = [entry for entry in sys.path if entry]
import hashlib, json, os
hashes = {}
for folder, _, names in os.walk(sys.argv[1]):
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isfile(path) and not os.path.islink(path):
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
            hashes[os.path.relpath(path, sys.argv[1])] = digest.hexdigest()
print(json.dumps(hashes))
"""

# Imports what the runner needs. Like the script above, it imports nothing from the current folder of the shell.
_IMPORTS = (
    "import sys; sys.path = [p for p in sys.path if p]; import numpy, onnxruntime; print(onnxruntime.__version__)"
)

# The exit code of the runner for answers that are out of tolerance.
_OUT_OF_TOLERANCE = 3
# The exit code of a shell whose command SIGKILL has ended.
_KILLED = 137


def measure_remotely(
    kit: Kit,
    shell: Shell,
    place: str,
    python: str = "python3",
    keep: bool = False,
    progress: Progress = silent,
) -> Json:
    """Run a kit on another machine and return its results.

    Args:
        shell: shell of the other machine.
        place: name of this target in the results.
        python: Python interpreter on the other machine; it needs onnxruntime and numpy.
        keep: leave the kit there, so that the next measurement copies only files that have changed.

    Raises:
        TargetError: the other machine has no Python, no onnxruntime or no disk space, the connection is lost, or the
            runner fails.
        ParityError: the answers of a model differ from the recorded ones.
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
        with progress(f"measure at {shell.name}", count_rounds(kit)) as advance:
            code, _, errors = shell.run(line, follow(advance))
        if code == _OUT_OF_TOLERANCE:
            raise ParityError(f"{shell.name}: {_error_message(errors)}")
        if code == _KILLED:
            raise TargetError(f"{shell.name}: the runner was killed there, most likely because it ran out of memory")
        if code != 0:
            raise TargetError(f"{shell.name}: {_error_message(errors)}")
        with tempfile.TemporaryDirectory() as local_folder:
            fetched = Path(local_folder, "results.json")
            shell.get(results, fetched)
            return read_results(fetched, kit.digest)
    finally:
        if not keep:
            _remove(shell, folder)


def _check_python(shell: Shell, python: str) -> None:
    code, _, errors = shell.run(f"{shlex.quote(python)} -c {shlex.quote(_IMPORTS)}")
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
    code, output, errors = shell.run(
        f"mkdir -p {quoted} && {shlex.quote(python)} -c {shlex.quote(_HASH_SCRIPT)} {quoted}"
    )
    if code != 0:
        raise TargetError(f"{shell.name}: {folder} cannot be created there: {_error_message(errors)}")
    remote_hashes = json.loads(output)
    hashes = {name: facts["sha256"] for name, facts in kit.facts["files"].items()} | {KIT: kit.digest}
    missing = [name for name, digest in hashes.items() if remote_hashes.get(name) != digest]
    folders = sorted({str(PurePosixPath(folder, name).parent) for name in missing})
    stale = [name for name in remote_hashes if name not in hashes]
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
    with suppress(TargetError):  # a lost connection allows no cleanup, and has been reported already
        shell.run(f"rm -rf {shlex.quote(folder)}")


def _error_message(errors: str) -> str:
    """Return the last error that the runner reports on stderr, or else the last line."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    messages = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return messages[-1] if messages else lines[-1] if lines else "it failed without a message"
