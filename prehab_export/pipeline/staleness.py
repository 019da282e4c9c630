"""Explanations of why a result no longer matches the run's options, from manifests alone, without model or data."""

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
    """An input of the run that results depend on by content.

    options: the options that determine the input.
    description: what messages call it.
    path_option: the option that holds the path of its files.
    """

    options: tuple[str, ...]
    description: str
    path_option: str | None = None


# The inputs, by their names in manifests.
SOURCES = {
    "model": Origin(("model", "revision"), "the model", "model"),
    "adapter": Origin(("adapter",), "the adapter", "adapter"),
    "own_code": Origin(("trust_remote_code",), "the origin of the model's code"),
    "data": Origin(("data",), "the data", "data.data"),
    "task": Origin(("task",), "the task"),
    "seed": Origin(("seed",), "the seed"),
    "batch_size": Origin(("data.batch_size",), "the batch size"),
    "dense_graph": Origin(("max_memory",), "the room for the dense graph"),
    "evaluation": Origin(("data",), "the evaluation data", "data.data"),
}
# The most bytes to hash in files with a new modification time, so that `status` stays quick.
HASH_LIMIT = 256_000_000


@dataclass(frozen=True)
class StaleReasons:
    """Why a result is stale: the options that differ, and other reasons in words."""

    options: tuple[Difference, ...] = ()
    others: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.options or self.others)


@dataclass(frozen=True)
class Staleness:
    """Comparison of results with the run's options and with its inputs as of the last command.

    recorded: stage → key of the result that the last command left as current.
    """

    workspace: Workspace
    config: RunConfig
    recorded: Mapping[str, str]

    @cached_property
    def _options(self) -> dict[str, Any]:
        return plain_options(self.config)

    @cached_property
    def _last_source(self) -> Mapping[str, Any]:
        """The options (``config``) and input fingerprints (``read``) at the start of the last command."""
        return read_json(self.workspace.root / SOURCE) or {"config": {}, "read": {}}

    @cached_property
    def files(self) -> dict[Path, str]:
        """File of an input → its change since the last command: ``gone``, ``changed`` or ``touched``.

        A touched file has a new modification time and is too large to hash. Unchanged files are left out.
        """
        rows = read_json(self.workspace.root / READ_FILES) or {}
        digests = {Path(name): FileDigest(*row) for name, row in rows.items()}
        return {path: change for path, change in _file_changes(digests) if change is not None}

    def reasons(self, stage: str, key: str) -> StaleReasons:
        """Return why a stage's result under a key does not match the options; empty if no reason is known."""
        manifest: Manifest = self.workspace.manifest(stage, key) or {"files": {}}
        made_by = (manifest.get("versions") or {}).get("prehab-export", version("prehab-export"))
        others = [] if made_by == version("prehab-export") else [f"made by version {made_by}"]
        if (name := self._damaged_file(stage, key, manifest)) is not None:
            others.append(f"{name} is gone or damaged")
        options = self.differing_options(stage, manifest)
        for name, value in (manifest.get("read") or {}).items():
            if name in SOURCES:
                source_options, reason = self._compare_source(SOURCES[name], name, value, manifest["config"])
                options += [difference for difference in source_options if difference not in options]
                others += [reason] if reason is not None and reason not in others else []
        if not (options or others):
            changed_parents = self._changed_parents(stage, manifest)
            others += [f"{parent} ran again with a different result" for parent in changed_parents]
        if not (options or others) and self._was_rejected(stage, key):
            others.append("something else that it was made from has changed")
        return StaleReasons(tuple(options), tuple(others))

    def differing_options(self, stage: str, manifest: Manifest) -> list[Difference]:
        """Return the options that have changed since the result was made and that the stage or an ancestor uses."""
        stages = [DEPENDENCIES[name] for name in (stage, *_ancestors(stage)) if name in DEPENDENCIES]
        changes = self._differences(manifest.get("config"))
        return [difference for difference in changes if self._matters(difference, stages)]

    def _differences(self, before: Mapping[str, Any] | None) -> list[Difference]:
        return [] if not before else differences(before, self._options)

    def _matters(self, difference: Difference, stages: Iterable[Dependencies]) -> bool:
        """Whether restoring the earlier value would change the options of any of the stages."""
        if any(_decides(source, difference) for source in SOURCES.values()):
            return False  # inputs are compared by content instead
        try:
            other = from_dict(RunConfig, with_value(self._options, difference.path, difference.before))
        except InputError:  # the value conflicts with the other options, or this version has no such option
            return True
        return any(_effective_options(stage, other) != _effective_options(stage, self.config) for stage in stages)

    def _compare_source(
        self, source: Origin, name: str, value: Any, config: Mapping[str, Any]
    ) -> tuple[list[Difference], str | None]:
        """Compare an input with what a result was made from.

        Args:
            name: the input's name in manifests.
            value: the input's fingerprint in the result's manifest.
            config: the options in the result's manifest.

        Returns:
            The options that changed the input, and a reason in words if it changed under the same options.
        """
        options = [difference for difference in self._differences(config) if _decides(source, difference)]
        # The last command's fingerprint is valid only if the options that determine the input have not changed since.
        is_known = name in self._last_source["read"] and not any(
            _decides(source, difference) for difference in self._differences(self._last_source["config"])
        )
        changed = value != self._last_source["read"][name] if is_known else bool(options)
        if changed:
            return options, None if options else f"{source.description} changed"
        files = [path.name for path in self._changed_files(source)]
        return [], f"{source.description} changed: {', '.join(files)}" if files else None

    def _changed_files(self, source: Origin) -> list[Path]:
        path = None if source.path_option is None else value_at(self._options, source.path_option)
        if path is None or not Path(path).exists():
            return []
        root = Path(path).resolve()
        return [file for file, change in self.files.items() if change == "changed" and file.is_relative_to(root)]

    def _was_rejected(self, stage: str, key: str) -> bool:
        """Whether the last command had the same options and yet did not accept this result."""
        config = self._last_source["config"]
        return bool(config) and not self._differences(config) and self.recorded.get(stage) != key

    def _damaged_file(self, stage: str, key: str, manifest: Manifest) -> str | None:
        folder = self.workspace.result(stage, key)
        for name, facts in manifest["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != facts["size"]:
                return name
        return None

    def _changed_parents(self, stage: str, manifest: Manifest) -> list[str]:
        """Return the parents whose current result differs from the one that this result was made from."""
        identities, workspace = manifest.get("parents"), self.workspace
        if identities is None or stage not in DEPENDENCIES:
            return []
        parents = [name for name in enabled_parents(DEPENDENCIES[stage], self.config) if workspace.has(name)]
        return [name for name in parents if identities.get(name) != workspace.identity(name, workspace.current[name])]


def describe_difference(difference: Difference) -> str:
    """Return an option's old and new values as text for people.

    >>> describe_difference(Difference("truncate.ratio", 0.6, 0.8))
    'truncate.ratio 0.6 → 0.8'
    """
    return f"{difference.path} {_format_value(difference.before)} → {_format_value(difference.after)}"


def _format_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _decides(source: Origin, difference: Difference) -> bool:
    """Whether a differing option is one of those that determine an input."""
    path = difference.path
    return any(path == option or path.startswith(f"{option}.") for option in source.options)


def _effective_options(stage: Dependencies, config: RunConfig) -> Any:
    """Return the options of a stage; None if the stage is disabled."""
    return stage.options(config) if stage.is_enabled(config) else None


def _ancestors(stage: str) -> list[str]:
    """Return the stages that a stage reads, directly or indirectly."""
    ancestors: list[str] = []
    for parent in DEPENDENCIES[stage].parents if stage in DEPENDENCIES else ():
        ancestors += [name for name in (parent, *_ancestors(parent)) if name not in ancestors]
    return ancestors


def _file_changes(digests: Mapping[Path, FileDigest]) -> Iterable[tuple[Path, str | None]]:
    """Yield each file with its change (see `Staleness.files`), or None if it is unchanged."""
    hashed_bytes = 0
    for path, digest in digests.items():
        if not path.is_file():
            yield path, "gone"
        elif path.stat().st_size != digest.size:
            yield path, "changed"
        elif path.stat().st_mtime_ns == digest.mtime_ns:
            yield path, None
        elif (hashed_bytes := hashed_bytes + digest.size) > HASH_LIMIT:
            yield path, "touched"
        else:
            yield path, None if digest.still_holds(path) else "changed"
