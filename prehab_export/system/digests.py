"""Digests of texts and of files, the latter remembered where a file has not been touched."""

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.publishing import publish_text


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha512_integrity(path: Path) -> str:
    """SHA-512 of a file's content in base64, as npm's registry tells it."""
    with path.open("rb") as file:
        return b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def sha256_of_text(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of_all(digests: Mapping[str, str]) -> str:
    """One digest of several files, name → SHA-256 in the order of the mapping: names count, too."""
    return sha256_of_text("".join(f"{name}\0{digest}\n" for name, digest in digests.items()))


@dataclass
class FileDigest:
    """What a file held when its size and time of modification were these: equal again, it is not read again."""

    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileDigest":
        # The time is taken first: what is written while it is read then counts as changed.
        facts = path.stat()
        return cls(facts.st_size, facts.st_mtime_ns, sha256_of(path))

    def still_holds(self, path: Path) -> bool:
        """Whether the file has this content. A file with another time but this content, as a copy has, is read once;
        its new time is then remembered here.
        """
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
    """SHA-256 of files that lie elsewhere (a model's weights), kept in a file from one command to the next."""

    path: Path
    _known: dict[str, FileDigest] = field(init=False)
    _asked: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8"))
            self._known = {name: FileDigest(*row) for name, row in rows.items()}
        except (OSError, ValueError, TypeError, AttributeError):  # not there, or not ours: everything is read anew
            self._known = {}

    def sha256_of(self, path: Path) -> str:
        """The file's hash, from memory where its size and time of modification are those of last time."""
        name = str(path.resolve())
        known, facts = self._known.get(name), path.stat()
        if known is None or (known.size, known.mtime_ns) != (facts.st_size, facts.st_mtime_ns):
            known = self._known[name] = FileDigest.of(path)
        self._asked.add(name)
        return known.sha256

    def save(self) -> None:
        """Remember what was asked for; files that nobody asks for any more are forgotten."""
        self._known = {name: digest for name, digest in self._known.items() if name in self._asked}
        rows = {name: [digest.size, digest.mtime_ns, digest.sha256] for name, digest in self._known.items()}
        publish_text(self.path, json.dumps(rows, indent=0) + "\n")
