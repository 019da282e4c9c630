"""A run's folder: what each stage made, why it is still valid, and how it gets there whole or not at all.

A stage's output is a folder; its manifest lies apart in ``manifests/`` and is written last. The manifest's key is a
hash over the stage's options and the keys of the stages before it, so a changed option invalidates what depends
on it and nothing else. A killed run leaves at most a ``.partial`` folder, which the next run clears away.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from converters.errors import InputError
from prehab_export.files import sha256_of

OPTIONS_FILE = "run.yaml"
# What makes a folder ours: only then is anything in it replaced or removed.
MARKER = "manifests/.prehab-export"
# Stages whose folder others rely on; the rest lie under stages/.
PUBLIC = frozenset({"artifact", "baseline", "fit", "report", "sweep"})
RECORDED_VERSIONS = (
    "prehab-export",
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "peft",
    "safetensors",
)


def stage_key(stage: str, options: Mapping[str, Any], parents: Sequence[str] = ()) -> str:
    """What a stage's output depends on, as one hash.

    >>> stage_key("truncate", {"ratio": 0.6}) == stage_key("truncate", {"ratio": 0.60})
    True
    >>> stage_key("truncate", {"ratio": 0.6}) == stage_key("truncate", {"ratio": 0.7})
    False
    """
    facts = {"stage": stage, "options": options, "parents": list(parents), "version": version("prehab-export")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Workspace:
    """The folder of one run."""

    root: Path

    @classmethod
    def open(cls, root: Path) -> "Workspace":
        """Create or reopen a run's folder.

        Raises:
            InputError: the folder exists and holds something that is not a run of ours, or is a file.
        """
        if root.exists() and not root.is_dir():
            raise InputError(f"{root} is a file; give a folder for the output")
        holds_files = any(path.is_file() for path in root.rglob("*"))
        if holds_files and not (root / MARKER).is_file():
            raise InputError(f"{root} holds something else; give an empty or new folder, or one of an earlier run")
        try:
            (root / MARKER).parent.mkdir(parents=True, exist_ok=True)
            (root / MARKER).touch()
        except OSError as error:
            raise InputError(f"cannot write to {root}: {error.strerror}") from error
        return cls(root)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process, and clear away what a killed one left.

        Raises:
            InputError: another process is working in the folder.
        """
        lock = FileLock(self.root / "manifests" / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"another run is working in {self.root}; wait for it or take another folder") from error
        try:
            for place in ("", "stages/", "manifests/"):
                for stale in self.root.glob(f"{place}*.partial"):
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            yield
        finally:
            lock.release()

    def folder(self, stage: str) -> Path:
        return self.root / stage if stage in PUBLIC else self.root / "stages" / stage

    def manifest(self, stage: str) -> dict[str, Any] | None:
        path = self._manifest_path(stage)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def is_current(self, stage: str, key: str) -> bool:
        """Whether the stage's output was made under this key and is still, byte for byte, what was written."""
        manifest = self.manifest(stage)
        if manifest is None or manifest["key"] != key:
            return False
        folder = self.folder(stage)
        return all(
            (folder / name).is_file() and sha256_of(folder / name) == digest
            for name, digest in manifest["files"].items()
        )

    @contextmanager
    def publish(self, stage: str, key: str, options: Mapping[str, Any]) -> Iterator[Path]:
        """A fresh folder to write into; it takes its place, with a manifest, only if the block succeeds."""
        folder = self.folder(stage)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        files = {
            path.relative_to(partial).as_posix(): sha256_of(path)
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        self.withdraw(stage)
        partial.rename(folder)
        manifest = {
            "stage": stage,
            "key": key,
            "options": dict(options),
            "versions": {name: version(name) for name in RECORDED_VERSIONS},
            "files": files,
        }
        _write_atomically(self._manifest_path(stage), json.dumps(manifest, indent=2, default=str) + "\n")

    def withdraw(self, stage: str) -> None:
        """Take a stage's output away; the manifest goes first, so that a kill in between leaves nothing that counts."""
        self._manifest_path(stage).unlink(missing_ok=True)
        if self.folder(stage).is_dir():
            shutil.rmtree(self.folder(stage))

    def read_json(self, stage: str, name: str) -> Any:
        return json.loads((self.folder(stage) / name).read_text(encoding="utf-8"))

    def save_options(self, text: str) -> None:
        _write_atomically(self.root / OPTIONS_FILE, text)

    def _manifest_path(self, stage: str) -> Path:
        return self.root / "manifests" / f"{stage}.json"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_disk_space(folder: Path, needed: int) -> None:
    """Raises:
    InputError: the file system of ``folder`` has less than ``needed`` bytes free.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(existing).free
    if free < needed - written:
        raise InputError(
            f"{folder} needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "free some space or give a folder on another disk with -o"
        )


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
