"""Why a result of a run no longer answers to the run's options: told from manifests alone, without model or data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converters.errors import InputError
from prehab_export.config import Difference, RunConfig, differences, from_dict, plain_options, value_at, with_value
from prehab_export.pipeline.stages.dependencies import DEPENDENCIES, Dependencies, enabled_parents
from prehab_export.pipeline.workspace import READ_FILES, SOURCE, Workspace
from prehab_export.system import FileDigest, read_json

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Origin:
    """Something that results are made from by its content: the options that decide it, what it is called, and the
    option that says where its files lie."""

    options: tuple[str, ...]
    words: str
    place: str | None = None


# By its name in manifests.
SOURCES = {
    "model": Origin(("model", "revision"), "the model", "model"),
    "adapter": Origin(("adapter",), "the adapter", "adapter"),
    "own_code": Origin(("trust_remote_code",), "whose code the model runs"),
    "data": Origin(("data",), "the data", "data.data"),
    "task": Origin(("task",), "the task"),
    "seed": Origin(("seed",), "the seed"),
    "batch_size": Origin(("data.batch_size",), "the batch size"),
    "evaluation": Origin(("data",), "the data to report on", "data.data"),
}
# Files are hashed to see whether a new time means new content, but for more bytes than these: that would take long.
HASHED = 256_000_000


@dataclass(frozen=True)
class StaleReasons:
    """What a result was made by that is another now: options, and the rest in words."""

    options: tuple[Difference, ...] = ()
    others: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.options or self.others)


@dataclass(frozen=True)
class Staleness:
    """What no longer holds of results, against these options and what is known of the model and the data.

    recorded: stage → key of what the last command left as current.
    """

    workspace: Workspace
    config: RunConfig
    recorded: Mapping[str, str]

    @cached_property
    def _options(self) -> dict[str, Any]:
        return plain_options(self.config)

    @cached_property
    def _known(self) -> Mapping[str, Any]:
        """What the run started from when its last command began: ``config`` and, by content, ``read``."""
        return read_json(self.workspace.root / SOURCE) or {"config": {}, "read": {}}

    @cached_property
    def files(self) -> dict[Path, str]:
        """File of the model or the data → what became of it since the last command: ``gone``, ``changed`` or, where
        its content would take long to read, ``touched``. Those that are as they were are left out."""
        rows = read_json(self.workspace.root / READ_FILES) or {}
        digests = {Path(name): FileDigest(*row) for name, row in rows.items()}
        return {path: found for path, found in _changes(digests) if found is not None}

    def reasons(self, stage: str, key: str) -> StaleReasons:
        """Why what the stage has made under this key is not what the options ask for; nothing where it is, as far as
        that can be told."""
        manifest: Manifest = self.workspace.manifest(stage, key) or {"files": {}}
        made_by = (manifest.get("versions") or {}).get("prehab-export", version("prehab-export"))
        others = [] if made_by == version("prehab-export") else [f"made by version {made_by}"]
        if (name := self._damaged(stage, key, manifest)) is not None:
            others.append(f"{name} is gone or damaged")
        options = self.differing_options(stage, manifest)
        for name, was in (manifest.get("read") or {}).items():
            if name in SOURCES:
                found, words = self._source(SOURCES[name], name, was, manifest["config"])
                options += [one for one in found if one not in options]
                others += [words] if words is not None and words not in others else []
        if not (options or others):
            others += [f"{parent} was made anew, with another outcome" for parent in self._made_anew(stage, manifest)]
        if not (options or others) and self._was_passed_over(stage, key):
            others.append("something else that it was made from is another now")
        return StaleReasons(tuple(options), tuple(others))

    def differing_options(self, stage: str, manifest: Manifest) -> list[Difference]:
        """The options of the work that are not as they were, of those that the stage or one that it reads depends
        on."""
        stages = [DEPENDENCIES[name] for name in (stage, *_ancestors(stage)) if name in DEPENDENCIES]
        return [one for one in self._differences(manifest.get("config")) if self._matters(one, stages)]

    def _differences(self, before: Mapping[str, Any] | None) -> list[Difference]:
        return [] if not before else differences(before, self._options)

    def _matters(self, one: Difference, stages: Iterable[Dependencies]) -> bool:
        if any(_is_of(source, one) for source in SOURCES.values()):
            return False  # its content decides
        try:
            other = from_dict(RunConfig, with_value(self._options, one.path, one.before))
        except InputError:  # the two do not go together, or this version has no such option
            return True
        return any(_asked(stage, other) != _asked(stage, self.config) for stage in stages)

    def _source(
        self, source: Origin, name: str, was: Any, before: Mapping[str, Any]
    ) -> tuple[list[Difference], str | None]:
        """What a result was made from that is another now: by its options, or in words where these are the same."""
        options = [one for one in self._differences(before) if _is_of(source, one)]
        is_known = name in self._known["read"] and not any(
            _is_of(source, one) for one in self._differences(self._known["config"])
        )
        changed = was != self._known["read"][name] if is_known else bool(options)
        if changed:
            return options, None if options else f"{source.words} changed"
        files = [path.name for path in self._changed_files(source)]
        return [], f"{source.words} changed: {', '.join(files)}" if files else None

    def _changed_files(self, source: Origin) -> list[Path]:
        place = None if source.place is None else value_at(self._options, source.place)
        if place is None or not Path(place).exists():
            return []
        root = Path(place).resolve()
        return [path for path, found in self.files.items() if found == "changed" and path.is_relative_to(root)]

    def _was_passed_over(self, stage: str, key: str) -> bool:
        """Whether the last command, under these very options, did not take this result for valid."""
        before = self._known["config"]
        return bool(before) and not self._differences(before) and self.recorded.get(stage) != key

    def _damaged(self, stage: str, key: str, manifest: Manifest) -> str | None:
        folder = self.workspace.result(stage, key)
        for name, facts in manifest["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != facts["size"]:
                return name
        return None

    def _made_anew(self, stage: str, manifest: Manifest) -> list[str]:
        """Stages whose current result is another than the one that this result was made from."""
        before, workspace = manifest.get("parents"), self.workspace
        if before is None or stage not in DEPENDENCIES:
            return []
        there = [name for name in enabled_parents(DEPENDENCIES[stage], self.config) if workspace.has(name)]
        return [name for name in there if before.get(name) != workspace.identity(name, workspace.current[name])]


def describe_difference(one: Difference) -> str:
    """An option that differs, as a person reads it.

    >>> describe_difference(Difference("truncate.ratio", 0.6, 0.8))
    'truncate.ratio 0.6 → 0.8'
    """
    return f"{one.path} {_short(one.before)} → {_short(one.after)}"


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _is_of(source: Origin, one: Difference) -> bool:
    return any(one.path == option or one.path.startswith(f"{option}.") for option in source.options)


def _asked(stage: Dependencies, config: RunConfig) -> Any:
    return stage.options(config) if stage.is_enabled(config) else None


def _ancestors(stage: str) -> list[str]:
    found: list[str] = []
    for parent in DEPENDENCIES[stage].parents if stage in DEPENDENCIES else ():
        found += [name for name in (parent, *_ancestors(parent)) if name not in found]
    return found


def _changes(digests: Mapping[Path, FileDigest]) -> Iterable[tuple[Path, str | None]]:
    read = 0
    for path, digest in digests.items():
        if not path.is_file():
            yield path, "gone"
        elif path.stat().st_size != digest.size:
            yield path, "changed"
        elif path.stat().st_mtime_ns == digest.mtime_ns:
            yield path, None
        elif (read := read + digest.size) > HASHED:
            yield path, "touched"
        else:
            yield path, None if digest.still_holds(path) else "changed"
