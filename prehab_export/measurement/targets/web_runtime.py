"""onnxruntime-web on this machine: a folder that was given, or one that npm has put into the cache once."""

import hmac
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from converters.errors import InputError
from converters.publishing import published_folder
from prehab_export.system import cache_folder, environment, find_program, sha512_integrity

WEB_VERSION = "1.30.0"
# Of the package as the registry has it (npm view onnxruntime-web@VERSION dist.integrity).
WEB_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
WEB_ENTRY = "ort.all.min.mjs"


def find_web(given: Path | None) -> Path:
    """The ``dist`` folder of onnxruntime-web: the given one, or one that npm puts into the cache once.

    Raises:
        InputError: it is not there, and npm is not there to get it, or gets something else.
    """
    if given is not None:
        if not (given / WEB_ENTRY).is_file():
            raise InputError(f"{given} holds no {WEB_ENTRY}; give the dist folder of onnxruntime-web")
        return given
    place = cache_folder() / f"onnxruntime-web-{WEB_VERSION}"
    if (place / WEB_ENTRY).is_file():
        return place
    npm = find_program("npm")
    if npm is None:
        raise InputError(
            "onnxruntime-web is not here, and there is no npm to get it; install npm, or give its dist folder with "
            "--ort-web"
        )
    with published_folder(place, replace=True) as dist, tempfile.TemporaryDirectory(dir=dist.parent) as scratch:
        archive = _packed(npm, Path(scratch))
        check_integrity(archive, WEB_SHA512)
        _unpack(archive, dist)
    return place


def _packed(npm: str, folder: Path) -> Path:
    """The package as the registry has it, unopened: npm runs none of its scripts, and reads no settings but the
    user's own."""
    package = f"onnxruntime-web@{WEB_VERSION}"
    done = subprocess.run(
        [npm, "pack", package, "--ignore-scripts", "--pack-destination", str(folder)],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    archives = list(folder.glob("*.tgz"))
    if done.returncode != 0 or len(archives) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise InputError(
            f"npm could not get {package}: {lines[0] if lines else 'no reason given'}; give its dist folder with "
            "--ort-web"
        )
    return archives[0]


def check_integrity(archive: Path, expected: str) -> None:
    """Raises:
    InputError: the archive is not the one whose SHA-512 (base64, as npm writes it) this program was made with.
    """
    found = sha512_integrity(archive)
    if not hmac.compare_digest(found, expected):
        raise InputError(
            f"onnxruntime-web {WEB_VERSION} came as something else than what this program was made with (sha512 "
            f"{found[:12]}…, not {expected[:12]}…): nothing of it was used; look at npm's registry setting, or give a "
            "dist folder that you trust with --ort-web"
        )


def _unpack(archive: Path, folder: Path) -> None:
    """The files of the package's ``dist``, which has no folders in it."""
    with tarfile.open(archive) as members:
        for member in members:
            where, _, name = member.name.rpartition("/")
            content = members.extractfile(member) if where == "package/dist" else None
            if content is not None:
                with content, (folder / name).open("wb") as file:
                    shutil.copyfileobj(content, file)
    if not (folder / WEB_ENTRY).is_file():
        raise InputError(f"onnxruntime-web {WEB_VERSION} has no {WEB_ENTRY}; give its dist folder with --ort-web")
