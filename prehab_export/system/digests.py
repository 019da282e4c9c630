"""Compute digests of texts and files, and reuse those of files that have not changed."""

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.publishing import publish_text
from prehab_export.system.progress import Progress, silent

# Bytes of a file that takes so long to read that its progress is shown, and bytes of one step of it.
LARGE, STEP = 2**28, 2**20


def sha256_of(path: Path, progress: Progress = silent) -> str:
    """Return the SHA-256 of a file's content, read in chunks, with progress in MiB if the file is large."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < LARGE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        with progress(f"read {path.name}, MiB", -(-size // STEP)) as advance:
            while chunk := file.read(STEP):
                digest.update(chunk)
                advance()
        return digest.hexdigest()


def sha512_integrity(path: Path) -> str:
    """Return the SHA-512 of a file's content in base64, as npm's registry states it."""
    with path.open("rb") as file:
        return b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def sha256_of_text(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of_all(digests: Mapping[str, str]) -> str:
    """Combine the digests of several files (name → SHA-256) into one; names and their order count."""
    return sha256_of_text("".join(f"{name}\0{digest}\n" for name, digest in digests.items()))


@dataclass
class FileDigest:
    """A file's digest with the size and modification time it had. As long as both are the same, the file is not read
    again."""

    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path, progress: Progress = silent) -> "FileDigest":
        """Read a file and note its digest, size and modification time."""
        # The time is read first, so that a file that is written meanwhile counts as changed.
        facts = path.stat()
        return cls(facts.st_size, facts.st_mtime_ns, sha256_of(path, progress))

    def still_holds(self, path: Path) -> bool:
        """Whether the file has this content. A file with the same content but another time, such as a copy, is read
        once; its new time is stored here."""
        if not path.is_file():
            return False
        facts = path.stat()
        if facts.st_size != self.size:
            return False
        if facts.st_mtime_ns != self.mtime_ns:
            if sha256_of(path) != self.sha256:
                return False
            self.mtime_ns = facts.st_mtime_ns
        return True


@dataclass
class DigestCache:
    """SHA-256 digests of files outside the run's folder (a model's weights), stored in a file between commands."""

    path: Path
    progress: Progress = silent
    _digests: dict[str, FileDigest] = field(init=False)
    _used_names: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8"))
            self._digests = {name: FileDigest(*row) for name, row in rows.items()}
        except (OSError, ValueError, TypeError, AttributeError):  # missing or unreadable: compute everything again
            self._digests = {}

    def sha256_of(self, path: Path) -> str:
        """Return the file's digest, without reading the file if its size and modification time have not changed."""
        name = str(path.resolve())
        digest, facts = self._digests.get(name), path.stat()
        if digest is None or (digest.size, digest.mtime_ns) != (facts.st_size, facts.st_mtime_ns):
            digest = self._digests[name] = FileDigest.of(path, self.progress)
        self._used_names.add(name)
        return digest.sha256

    def save(self) -> None:
        """Write the digests that were used; those of other files are dropped."""
        self._digests = {name: digest for name, digest in self._digests.items() if name in self._used_names}
        rows = {name: [digest.size, digest.mtime_ns, digest.sha256] for name, digest in self._digests.items()}
        publish_text(self.path, json.dumps(rows, indent=0) + "\n")
