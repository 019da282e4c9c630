"""A run's folder: what each stage made, why it is still valid, and how it gets there whole or not at all.

The result of a stage is a folder under the stage's *key*, ``stages/<stage>/<key>/``. The key is a hash over the
stage's options and over what the stages before it made, by content: an option that comes back finds its result again,
and a stage that is done again and makes the same leaves everything after it valid. The result's manifest lies apart,
in ``manifests/<stage>/<key>.json``, and is written last. A killed run leaves at most a ``.partial`` folder, which the
next run clears away.

``manifests/current.json`` says which result of each stage answers to the run's options. Of the stages that people look
into (`SHOWN`) the current one is also shown beside ``run.yaml``, as hard links.
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
    is_full,
    link,
    read_json,
    remove,
    replacing,
    same_content,
    sha256_of_text,
)

OPTIONS_FILE = "run.yaml"
# What makes a folder ours: only then is anything in it replaced or removed.
MARKER = "manifests/.prehab-export"
CURRENT = "manifests/current.json"
# Hashes of the files that a run reads from elsewhere, what it starts from by content as of the last command, and hashes
# of the graphs in the kits that it has made.
READ_FILES = "manifests/digests.json"
SOURCE = "manifests/source.json"
KITS_MADE = "manifests/kits.json"
# Records that are no stage's.
RECORDS = frozenset({CURRENT, READ_FILES, SOURCE, KITS_MADE})
# Stages whose current result also stands in the run's folder, under the stage's name.
SHOWN = frozenset({"artifact", "baseline", "report"})
# Kits on their way to where they are measured.
KITS = ".kit-*"
# What a killed process may leave.
UNFINISHED = (
    *(f"{place}*{PARTIAL}" for place in ("", "stages/*/", "manifests/", "manifests/*/", "targets/")),
    KITS,
)
# Digits of a key in the name of a folder.
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
    """What a stage's output depends on, as one hash; ``parents`` are the identities of the results that it reads.

    >>> stage_key("truncate", {"ratio": 0.6}) == stage_key("truncate", {"ratio": 0.60})
    True
    >>> stage_key("truncate", {"ratio": 0.6}) == stage_key("truncate", {"ratio": 0.7})
    False
    """
    facts = {"stage": stage, "options": options, "parents": list(parents), "version": version("prehab-export")}
    return sha256_of_text(json.dumps(facts, sort_keys=True, default=str))


def summaries(values: Mapping[str, Any]) -> dict[str, Any]:
    """What was read, to be told from what is read another time: a hash stands for what is long.

    >>> summaries({"seed": 0, "files": {"a": "1" * 99}})["files"].startswith("sha256:")
    True
    """

    def summary(value: Any) -> Any:
        text = json.dumps(value, sort_keys=True, default=str)
        return value if len(text) < 80 else f"sha256:{sha256_of_text(text)}"

    return {name: summary(value) for name, value in values.items()}


@dataclass(frozen=True)
class Leftover:
    """A result that no current option needs, and the bytes that are free without it and the others; ``key`` is the
    name of its folder."""

    stage: str
    key: str
    bytes: int


@dataclass
class Workspace:
    """The folder of one run.

    current: stage → key of the result that answers to the options in use. `select` sets it.
    keeps_selection: whether that is kept for the next command, and shown.
    is_written: whether anything is written to it at all; where not, what is found out is forgotten.
    """

    root: Path
    current: dict[str, str] = field(default_factory=dict)
    keeps_selection: bool = True
    is_written: bool = True

    @classmethod
    def open(cls, root: Path) -> "Workspace":
        """Create or reopen a run's folder.

        Raises:
            InputError: the folder exists and holds something that is not a run of ours, or is a file.
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
    def looked_at(cls, root: Path) -> "Workspace":
        """A run's folder, or the place for a new one, that nothing is written to.

        Raises:
            InputError: as of `open`.
        """
        cls._check(root)
        workspace = cls(root, is_written=False)
        workspace._read_selection()
        return workspace

    @classmethod
    def existing(cls, root: Path) -> "Workspace | None":
        """A run's folder, to read in; None where there is none."""
        return cls._reopened(root) if (root / MARKER).is_file() else None

    @classmethod
    def _reopened(cls, root: Path) -> "Workspace":
        workspace = cls(root)
        workspace._read_selection()
        return workspace

    def _read_selection(self) -> None:
        kept = read_json(self.root / CURRENT) or {}
        self.current = {
            stage: key
            for stage, key in kept.items()
            if self._manifest_path(stage, key).is_file() and self.result(stage, key).is_dir()
        }

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process, clear away what a killed one left, and see what the last one selected.

        Raises:
            InputError: another process is working in the folder.
        """
        try:
            with FileLock(self.root / "manifests" / ".lock", blocking=False):
                for pattern in UNFINISHED:
                    for stale in self.root.glob(pattern):
                        remove(stale)
                self._read_selection()
                yield
        except Timeout as error:
            raise InputError(f"another run is working in {self.root}; wait for it or take another folder") from error

    # Results, by key.

    def find(self, stage: str, key: str) -> Path | None:
        """The folder of what the stage made under this key; None where that is not there, or not as it was written.

        Files are told by size and time of modification, and read again only where the time is another.
        """
        manifest = self.manifest(stage, key)
        if manifest is None or manifest["key"] != key:
            return None
        folder = self.result(stage, key)
        files = {name: FileDigest(**facts) for name, facts in manifest["files"].items()}
        if not all(digest.still_holds(folder / name) for name, digest in files.items()):
            return None
        told = {name: asdict(digest) for name, digest in files.items()}
        if told != manifest["files"] and self.is_written:  # a copied folder has other times
            self._write_manifest(stage, key, manifest | {"files": told})
        return folder

    @contextmanager
    def publish(
        self, stage: str, key: str, options: Mapping[str, Any], origin: Mapping[str, Any] | None = None
    ) -> Iterator[Path]:
        """A fresh folder to write into; it becomes the result under this key only if the block succeeds.

        Args:
            origin: what else the key was made of, for the manifest.

        Raises:
            StorageError: the disk is full, or not to be written to.
        """
        folder, started = self.result(stage, key), time.monotonic()
        with replacing(folder) as partial:
            yield partial
            seconds = time.monotonic() - started
            files = {
                path.relative_to(partial).as_posix(): asdict(FileDigest.of(path))
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            }
            # The manifest of what is replaced goes first: a kill in between then leaves nothing that counts.
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

    def result(self, stage: str, key: str) -> Path:
        """Where the result under this key lies, or would lie."""
        return self.root / "stages" / stage / key[:KEY_DIGITS]

    def identity(self, stage: str, key: str) -> str:
        """What was asked of a stage and what it made, as one string for the keys of the stages that read it."""
        manifest = self.manifest(stage, key)
        assert manifest is not None, f"{stage} has no result under {key}"
        content = [[name, facts["sha256"]] for name, facts in sorted(manifest["files"].items())]
        return f"{key}:{sha256_of_text(json.dumps(content))}"

    def manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        return read_json(self._manifest_path(stage, key))

    def keys(self, stage: str) -> list[str]:
        """The keys under which the stage has made something."""
        manifests = (read_json(path) for path in sorted(self.root.glob(f"manifests/{stage}/*.json")))
        return [manifest["key"] for manifest in manifests if manifest is not None]

    def size(self, stage: str, key: str) -> int:
        """Bytes of a result."""
        manifest = self.manifest(stage, key)
        return 0 if manifest is None else sum(facts["size"] for facts in manifest["files"].values())

    # Results that answer to the options in use.

    def has(self, stage: str) -> bool:
        return stage in self.current

    def folder(self, stage: str) -> Path:
        """Where the current result of a stage lies."""
        return self.result(stage, self.current[stage])

    def read_json(self, stage: str, name: str) -> Any:
        return json.loads((self.folder(stage) / name).read_text(encoding="utf-8"))

    def select(self, stage: str, key: str | None) -> None:
        """Take the result under this key as the current one; None: there is none."""
        if key is None:
            self.current.pop(stage, None)
        else:
            self.current[stage] = key

    def discard(self, stage: str, key: str) -> None:
        """Let the result under this key count no more; its files stay until they are replaced or cleaned."""
        self._manifest_path(stage, key).unlink(missing_ok=True)
        self.select(stage, None)

    def save_selection(self) -> None:
        """Keep what is current for the next command, and show the results that people look into.

        A result that is no longer current must not stand there looking finished: it is taken from sight first.
        """
        if not self.keeps_selection:
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
        """Take a folder that is shown from sight; the result itself stays."""
        if (self.root / name).is_dir():
            shutil.rmtree(self.root / name)

    @contextmanager
    def show(self, name: str) -> Iterator[Path]:
        """A fresh folder to write into, which takes the place of ``OUT/name`` if the block succeeds: for what is no
        stage's result (the tables of a sweep).

        Raises:
            StorageError: the disk is full, or not to be written to.
        """
        with replacing(self.root / name) as partial:
            yield partial

    def leftovers(self) -> list[Leftover]:
        """Results that are not current, and whatever else lies among results and no manifest speaks for: what an
        earlier version left, say.

        Raises:
            InputError: the saved options cannot be read, so that nobody knows what they need.
        """
        kept = {self.result(stage, key) for stage, key in self.current.items()}
        places = [place for place in sorted(self.root.glob("stages/*/*")) if place not in kept]
        starts = self._starting_points()
        places = [place for place in places if not any(start.is_relative_to(place.resolve()) for start in starts)]
        files = {place: [path.stat() for path in (place, *place.rglob("*")) if path.is_file()] for place in places}
        names = Counter((facts.st_dev, facts.st_ino) for own in files.values() for facts in own)
        found: list[Leftover] = []
        counted: set[tuple[int, int]] = set()
        for place, own in files.items():
            # A file that something else names too, the artifact say, does not go; the others are counted once.
            gone = {(f.st_dev, f.st_ino): f.st_size for f in own if f.st_nlink <= names[f.st_dev, f.st_ino]}
            size = sum(size for file, size in gone.items() if file not in counted)
            counted |= gone.keys()
            found.append(Leftover(place.parent.name, place.name, size))
        return found

    def remove(self, leftover: Leftover) -> None:
        """Take a result away for good; its manifest goes first."""
        self._manifest_path(leftover.stage, leftover.key).unlink(missing_ok=True)
        remove(self.root / "stages" / leftover.stage / leftover.key)

    def forget_missing(self) -> None:
        """Remove manifests of what is not there, those of another layout included, and folders that are empty."""
        for path in self.root.glob("manifests/*/*.json"):
            if not (self.root / "stages" / path.parent.name / path.stem).is_dir():
                path.unlink()
        for path in self.root.glob("manifests/*.json"):
            if path.relative_to(self.root).as_posix() not in RECORDS:
                path.unlink()
        for folder in (*self.root.glob("stages/*"), *self.root.glob("manifests/*")):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _starting_points(self) -> list[Path]:
        """What the saved options start from; it may lie among the results, as the demo's model does."""
        if not self.has_options:
            return []
        path = self.root / OPTIONS_FILE
        try:
            options = yaml.safe_load(path.read_text(encoding="utf-8"))
            names = (options["model"], options.get("adapter"), options["data"]["data"])
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no options that can be read; give them anew with `run MODEL`") from error
        return [Path(name).resolve() for name in names if name is not None]

    def save_options(self, text: str) -> None:
        publish_text(self.root / OPTIONS_FILE, text)

    @property
    def has_results(self) -> bool:
        """Whether any stage has made anything, under whatever options."""
        return any(self.root.glob("manifests/*/*.json"))

    @property
    def has_options(self) -> bool:
        return (self.root / OPTIONS_FILE).is_file()

    def _is_shown(self, stage: str) -> bool:
        place = self.root / stage
        if stage not in self.current:
            return not place.exists()
        manifest, folder = self.manifest(stage, self.current[stage]), self.folder(stage)
        assert manifest is not None
        return all(same_content(place / name, folder / name) for name in manifest["files"])

    def _manifest_path(self, stage: str, key: str) -> Path:
        return self.root / "manifests" / stage / f"{key[:KEY_DIGITS]}.json"

    def _write_manifest(self, stage: str, key: str, manifest: Mapping[str, Any]) -> None:
        path = self._manifest_path(stage, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_text(path, json.dumps(manifest, indent=2, default=str) + "\n")
