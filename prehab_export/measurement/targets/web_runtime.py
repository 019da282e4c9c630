"""onnxruntime-web on this machine: a folder of the user's, or the cached package from npm."""

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
# The digest of the package in the registry (npm view onnxruntime-web@VERSION dist.integrity).
WEB_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
WEB_ENTRY = "ort.all.min.mjs"


def find_web(folder: Path | None) -> Path:
    """Return the ``dist`` folder of onnxruntime-web.

    Args:
        folder: the user's ``dist`` folder. When None, the cached folder is used, which npm fills on first use.

    Raises:
        InputError: the user's folder is not a ``dist`` folder, npm is missing or fails, or its package is not the
            expected one.
    """
    if folder is not None:
        if not (folder / WEB_ENTRY).is_file():
            raise InputError(f"{folder} holds no {WEB_ENTRY}; give the dist folder of onnxruntime-web")
        return folder
    cached = cache_folder() / f"onnxruntime-web-{WEB_VERSION}"
    if (cached / WEB_ENTRY).is_file():
        return cached
    npm = find_program("npm")
    if npm is None:
        raise InputError(
            "onnxruntime-web is not here, and there is no npm to get it; install npm, or give the dist folder of "
            "onnxruntime-web with --ort-web"
        )
    with published_folder(cached, replace=True) as dist, tempfile.TemporaryDirectory(dir=dist.parent) as scratch:
        archive = _download(npm, Path(scratch))
        check_integrity(archive, WEB_SHA512)
        _unpack(archive, dist)
    return cached


def _download(npm: str, folder: Path) -> Path:
    """Download the package with npm, and return the archive.

    npm does not run the package's scripts. It runs in ``folder``, where it finds no settings but the user's own.
    """
    package = f"onnxruntime-web@{WEB_VERSION}"
    process = subprocess.run(
        [npm, "pack", package, "--ignore-scripts", "--pack-destination", str(folder)],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    archives = list(folder.glob("*.tgz"))
    if process.returncode != 0 or len(archives) != 1:
        lines = [line for line in process.stderr.splitlines() if line.strip()]
        raise InputError(
            f"npm could not download {package}: {lines[0] if lines else 'no reason given'}; give its dist folder with "
            "--ort-web"
        )
    return archives[0]


def check_integrity(archive: Path, expected: str) -> None:
    """Check the digest of an archive.

    Args:
        expected: SHA-512 digest in base64, as npm writes it.

    Raises:
        InputError: the digest differs.
    """
    actual = sha512_integrity(archive)
    if not hmac.compare_digest(actual, expected):
        raise InputError(
            f"the downloaded onnxruntime-web {WEB_VERSION} is not the expected package (sha512 {actual[:12]}…, not "
            f"{expected[:12]}…), and was not used; check npm's registry setting, or give a dist folder that you trust "
            "with --ort-web"
        )


def _unpack(archive: Path, folder: Path) -> None:
    """Extract the files of the package's ``dist`` folder, which has no subfolders."""
    with tarfile.open(archive) as members:
        for member in members:
            parent, _, name = member.name.rpartition("/")
            content = members.extractfile(member) if parent == "package/dist" else None
            if content is not None:
                with content, (folder / name).open("wb") as file:
                    shutil.copyfileobj(content, file)
    if not (folder / WEB_ENTRY).is_file():
        raise InputError(f"onnxruntime-web {WEB_VERSION} has no {WEB_ENTRY}; give its dist folder with --ort-web")
