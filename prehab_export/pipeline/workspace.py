"""The folder of a run: stage results, their manifests, and atomic publishing.

The result of a stage is a folder named by the stage's *key*, ``stages/<stage>/<key>/``. The key hashes the stage's
options and the contents of its parents' results. Restoring an earlier option therefore finds the earlier result, and a
stage that runs again with the same output keeps all later results valid. The result's manifest,
``manifests/<stage>/<key>.json``, is written last. A killed run leaves at most a ``.partial`` folder, which the next run
removes.

``manifests/current.json`` records which result of each stage matches the run's options. The current results of the
stages in `SHOWN`, which people look into, also appear beside ``run.yaml`` as hard links.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from converters.errors import InputError
from converters.publishing import PARTIAL, publish_text
from prehab_export.system import (
    FileDigest,
    StorageError,
    bar,
    is_full,
    link,
    read_json,
    remove,
    replacing,
    same_content,
    sha256_of_text,
)

OPTIONS_FILE = "run.yaml"
# Marks a folder as a run's. Nothing is replaced or removed in a folder without it.
MARKER = "manifests/.prehab-export"
CURRENT = "manifests/current.json"
# Hashes of the external files that a run reads.
READ_FILES = "manifests/digests.json"
# Content of the run's inputs (model, data and so on) at the last command.
SOURCE = "manifests/source.json"
# Hashes of the graphs in every kit that the run has made.
KIT_GRAPHS = "manifests/kits.json"
# Records that belong to the whole run rather than to a stage.
RECORDS = frozenset({CURRENT, READ_FILES, SOURCE, KIT_GRAPHS})
# Stages whose current result also appears in the run's folder, under the stage's name.
SHOWN = frozenset({"artifact", "baseline", "report"})
# Temporary kits that are being measured on a target.
KITS = ".kit-*"
# Patterns of what a killed process may leave behind.
UNFINISHED = (
    *(f"{parent}*{PARTIAL}" for parent in ("", "stages/*/", "manifests/", "manifests/*/", "targets/")),
    KITS,
)
# Start of the name of a folder with parts of a result.
UNFINISHED_RESULT = "unfinished-"
# Digits of the key in a result's folder name.
KEY_DIGITS = 16
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
    """Return a hash of everything that a stage's output depends on.

    Args:
        parents: identities of the results that the stage reads (`Workspace.identity`).

    >>> stage_key("truncate", {"ratio": 0.6}) == stage_key("truncate", {"ratio": 0.60})
    True
    >>> stage_key("truncate", {"ratio": 0.6}) == stage_key("truncate", {"ratio": 0.7})
    False
    """
    facts = {"stage": stage, "options": options, "parents": list(parents), "version": version("prehab-export")}
    return sha256_of_text(json.dumps(facts, sort_keys=True, default=str))


def summaries(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with every long one replaced by its hash, so that two readings can be compared.

    >>> summaries({"seed": 0, "files": {"a": "1" * 99}})["files"].startswith("sha256:")
    True
    """

    def summary(value: Any) -> Any:
        text = json.dumps(value, sort_keys=True, default=str)
        return value if len(text) < 80 else f"sha256:{sha256_of_text(text)}"

    return {name: summary(value) for name, value in values.items()}


@dataclass(frozen=True)
class Leftover:
    """A result that the current options do not need.

    key: the name of the result's folder.
    bytes: the disk space that removing this leftover frees when all leftovers are removed together.
    """

    stage: str
    key: str
    bytes: int


@dataclass
class Workspace:
    """The folder of one run.

    current: stage → key of the result that matches the options in use; set by `select`.
    saves_selection: whether `save_selection` records ``current`` for the next command and shows its results.
    writable: whether anything is written to the folder at all.
    """

    root: Path
    current: dict[str, str] = field(default_factory=dict)
    saves_selection: bool = True
    writable: bool = True
    _unfinished: Path | None = field(default=None, init=False)

    @classmethod
    def open(cls, root: Path) -> "Workspace":
        """Create or reopen a run's folder.

        Raises:
            InputError: the path is a file, or a folder that holds something other than a run.
            StorageError: the disk is full.
        """
        cls._check(root)
        try:
            (root / MARKER).parent.mkdir(parents=True, exist_ok=True)
            (root / MARKER).touch()
        except OSError as error:
            if is_full(error):
                raise StorageError(f"cannot write to {root}: {error.strerror}; free some space first") from error
            raise InputError(f"cannot write to {root}: {error.strerror}") from error
        return cls._reopened(root)

    @staticmethod
    def _check(root: Path) -> None:
        if root.exists() and not root.is_dir():
            raise InputError(f"{root} is a file; give a folder for the output")
        if not (root / MARKER).is_file() and any(path.is_file() for path in root.rglob("*")):
            raise InputError(f"{root} holds something else; give an empty or new folder, or one of an earlier run")

    @classmethod
    def open_read_only(cls, root: Path) -> "Workspace":
        """Open a run's folder, or the path of a new one, without ever writing to it.

        Raises:
            InputError: as for `open`.
        """
        cls._check(root)
        workspace = cls(root, writable=False)
        workspace._read_selection()
        return workspace

    @classmethod
    def open_existing(cls, root: Path) -> "Workspace | None":
        """Return the workspace of a run's folder, or None if the folder is not a run's."""
        return cls._reopened(root) if (root / MARKER).is_file() else None

    @classmethod
    def _reopened(cls, root: Path) -> "Workspace":
        workspace = cls(root)
        workspace._read_selection()
        return workspace

    def _read_selection(self) -> None:
        selection = read_json(self.root / CURRENT) or {}
        self.current = {
            stage: key
            for stage, key in selection.items()
            if self._manifest_path(stage, key).is_file() and self.result(stage, key).is_dir()
        }

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process, remove what a killed process left, and reload the saved selection.

        Raises:
            InputError: another process is working in the folder.
        """
        try:
            with FileLock(self.root / "manifests" / ".lock", blocking=False):
                for pattern in UNFINISHED:
                    for path in self.root.glob(pattern):
                        remove(path)
                self._read_selection()
                yield
        except Timeout as error:
            raise InputError(f"another run is using {self.root}; wait for it or use another folder") from error

    # Results by key.

    def find(self, stage: str, key: str) -> Path | None:
        """Return the folder of a stage's result under a key, or None if it is missing or altered.

        Files are compared by size and modification time, and hashed only if the time differs.
        """
        manifest = self.manifest(stage, key)
        if manifest is None or manifest["key"] != key:
            return None
        folder = self.result(stage, key)
        files = {name: FileDigest(**facts) for name, facts in manifest["files"].items()}
        if not all(digest.still_holds(folder / name) for name, digest in files.items()):
            return None
        facts = {name: asdict(digest) for name, digest in files.items()}
        if facts != manifest["files"] and self.writable:  # copying a folder changes its files' times
            self._write_manifest(stage, key, manifest | {"files": facts})
        return folder

    @contextmanager
    def publish(
        self, stage: str, key: str, options: Mapping[str, Any], origin: Mapping[str, Any] | None = None
    ) -> Iterator[Path]:
        """Give an empty folder to write into, which becomes the result under this key only if the block succeeds.

        Within the block, `unfinished` is a folder that outlives a kill or a full disk.

        Args:
            options: the stage's options, for the manifest.
            origin: everything else that the key depends on, for the manifest.

        Raises:
            StorageError: the disk is full or cannot be written to.
        """
        folder, started = self.result(stage, key), time.monotonic()
        with self._keeping_unfinished(stage, key), replacing(folder) as partial:
            yield partial
            seconds = time.monotonic() - started
            files = {
                path.relative_to(partial).as_posix(): asdict(FileDigest.of(path, bar))
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            }
            # Remove the old result's manifest first, so that a kill before the swap leaves no half-valid result.
            self._manifest_path(stage, key).unlink(missing_ok=True)
        manifest = {
            "stage": stage,
            "key": key,
            "options": dict(options),
            **(origin or {}),
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 2),
            "versions": {name: version(name) for name in RECORDED_VERSIONS},
            "files": files,
        }
        self._write_manifest(stage, key, manifest)

    @property
    def unfinished(self) -> Path:
        """The folder for parts of the result that is being written, which need not exist yet.

        After a kill it is still there, for the next process that writes the result under the same key.
        """
        assert self._unfinished is not None, "no result is being written"
        return self._unfinished

    def share_unfinished(self, folder: Path) -> None:
        """Work on the parts of a result that another process is writing, which are in this folder."""
        self._unfinished = folder

    @contextmanager
    def _keeping_unfinished(self, stage: str, key: str) -> Iterator[None]:
        self._unfinished = self.result(stage, key).with_name(UNFINISHED_RESULT + key[:KEY_DIGITS])
        for other in self._unfinished.parent.glob(UNFINISHED_RESULT + "*"):
            if other != self._unfinished:
                remove(other)
        try:
            yield
        except (OSError, StorageError):
            raise
        except Exception:
            remove(self._unfinished)
            raise
        else:
            remove(self._unfinished)
        finally:
            self._unfinished = None

    def result(self, stage: str, key: str) -> Path:
        """Return the folder of the result under this key, whether or not it exists."""
        return self.root / "stages" / stage / key[:KEY_DIGITS]

    def identity(self, stage: str, key: str) -> str:
        """Return a string that identifies a result by its key and content, for the keys of the stages that read it."""
        manifest = self.manifest(stage, key)
        assert manifest is not None, f"{stage} has no result under {key}"
        content = [[name, facts["sha256"]] for name, facts in sorted(manifest["files"].items())]
        return f"{key}:{sha256_of_text(json.dumps(content))}"

    def manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        return read_json(self._manifest_path(stage, key))

    def keys(self, stage: str) -> list[str]:
        """Return the keys of all results of a stage."""
        manifests = (read_json(path) for path in sorted(self.root.glob(f"manifests/{stage}/*.json")))
        return [manifest["key"] for manifest in manifests if manifest is not None]

    def size(self, stage: str, key: str) -> int:
        """Return the size of a result in bytes."""
        manifest = self.manifest(stage, key)
        return 0 if manifest is None else sum(facts["size"] for facts in manifest["files"].values())

    # Current results: the ones that match the options in use.

    def has(self, stage: str) -> bool:
        """Whether the stage has a current result."""
        return stage in self.current

    def folder(self, stage: str) -> Path:
        """Return the folder of a stage's current result."""
        return self.result(stage, self.current[stage])

    def read_json(self, stage: str, name: str) -> Any:
        return json.loads((self.folder(stage) / name).read_text(encoding="utf-8"))

    def select(self, stage: str, key: str | None) -> None:
        """Make the result under this key the stage's current one; None leaves the stage without a current result."""
        if key is None:
            self.current.pop(stage, None)
        else:
            self.current[stage] = key

    def discard(self, stage: str, key: str) -> None:
        """Invalidate the result under this key; its files stay until they are replaced or cleaned."""
        self._manifest_path(stage, key).unlink(missing_ok=True)
        self.select(stage, None)

    def save_selection(self) -> None:
        """Record the current results for the next command, and show those of the stages in `SHOWN`.

        A result that is no longer current is hidden first, so that it never looks like the finished one.
        """
        if not self.saves_selection:
            return
        outdated = [stage for stage in sorted(SHOWN) if not self._is_shown(stage)]
        for stage in outdated:
            self.hide(stage)
        publish_text(self.root / CURRENT, json.dumps(self.current, indent=2, sort_keys=True) + "\n")
        for stage in outdated:
            if stage in self.current:
                with replacing(self.root / stage) as partial:
                    shutil.copytree(self.folder(stage), partial, copy_function=link, dirs_exist_ok=True)

    def hide(self, name: str) -> None:
        """Remove a shown folder; the result itself stays."""
        if (self.root / name).is_dir():
            shutil.rmtree(self.root / name)

    @contextmanager
    def show(self, name: str) -> Iterator[Path]:
        """Give an empty folder to write into, which replaces ``OUT/name`` if the block succeeds.

        This is for output that is not a stage's result, such as the tables of a sweep.

        Raises:
            StorageError: the disk is full or cannot be written to.
        """
        with replacing(self.root / name) as partial:
            yield partial

    def leftovers(self) -> list[Leftover]:
        """Return the results that are not current, and anything else among the results that has no manifest.

        The latter may come from an earlier version of this package.

        Raises:
            InputError: the saved options cannot be read, so it is unknown what they need.
        """
        current = {self.result(stage, key) for stage, key in self.current.items()}
        folders = [folder for folder in sorted(self.root.glob("stages/*/*")) if folder not in current]
        inputs = self._input_paths()
        folders = [folder for folder in folders if not any(path.is_relative_to(folder.resolve()) for path in inputs)]
        stats = {folder: [path.stat() for path in (folder, *folder.rglob("*")) if path.is_file()] for folder in folders}
        links = Counter((file.st_dev, file.st_ino) for files in stats.values() for file in files)
        leftovers: list[Leftover] = []
        counted: set[tuple[int, int]] = set()
        for folder, files in stats.items():
            # A file with a hard link elsewhere, such as in the artifact, frees nothing. Others count once.
            freed = {(f.st_dev, f.st_ino): f.st_size for f in files if f.st_nlink <= links[f.st_dev, f.st_ino]}
            size = sum(size for file, size in freed.items() if file not in counted)
            counted |= freed.keys()
            leftovers.append(Leftover(folder.parent.name, folder.name, size))
        return leftovers

    def remove(self, leftover: Leftover) -> None:
        """Delete a result, its manifest first."""
        self._manifest_path(leftover.stage, leftover.key).unlink(missing_ok=True)
        remove(self.root / "stages" / leftover.stage / leftover.key)

    def prune(self) -> None:
        """Remove manifests without a result, records of an older layout, and empty folders."""
        for path in self.root.glob("manifests/*/*.json"):
            if not (self.root / "stages" / path.parent.name / path.stem).is_dir():
                path.unlink()
        for path in self.root.glob("manifests/*.json"):
            if path.relative_to(self.root).as_posix() not in RECORDS:
                path.unlink()
        for folder in (*self.root.glob("stages/*"), *self.root.glob("manifests/*")):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _input_paths(self) -> list[Path]:
        """Return the model, adapter and data in the saved options. The demo's model lies among the results."""
        if not self.has_options:
            return []
        path = self.root / OPTIONS_FILE
        try:
            options = yaml.safe_load(path.read_text(encoding="utf-8"))
            names = (options["model"], options.get("adapter"), options["data"]["data"])
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no readable options; give them again with `run MODEL`") from error
        return [Path(name).resolve() for name in names if name is not None]

    def save_options(self, text: str) -> None:
        publish_text(self.root / OPTIONS_FILE, text)

    @property
    def has_results(self) -> bool:
        """Whether any stage has a result, under any options."""
        return any(self.root.glob("manifests/*/*.json"))

    @property
    def has_options(self) -> bool:
        return (self.root / OPTIONS_FILE).is_file()

    def _is_shown(self, stage: str) -> bool:
        shown = self.root / stage
        if stage not in self.current:
            return not shown.exists()
        manifest, folder = self.manifest(stage, self.current[stage]), self.folder(stage)
        assert manifest is not None
        return all(same_content(shown / name, folder / name) for name in manifest["files"])

    def _manifest_path(self, stage: str, key: str) -> Path:
        return self.root / "manifests" / stage / f"{key[:KEY_DIGITS]}.json"

    def _write_manifest(self, stage: str, key: str, manifest: Mapping[str, Any]) -> None:
        path = self._manifest_path(stage, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_text(path, json.dumps(manifest, indent=2, default=str) + "\n")
