"""Results that targets have measured for a run, and which of them belong to the run's current graphs."""

import json
from collections.abc import Mapping
from pathlib import Path

from prehab_export.measurement import Json, read_results
from prehab_export.pipeline.workspace import KIT_GRAPHS
from prehab_export.system import write_json

# The subfolder of a run with the results of targets.
FOLDER = "targets"


def record_kit(root: Path, digest: str, graphs: Mapping[str, str]) -> None:
    """Record which graphs a kit holds, so that its results can be matched with them later.

    Args:
        root: the run's folder.
        digest: the kit's digest.
        graphs: graph name → hash.
    """
    kits = _load_kit_graphs(root) | {digest: dict(graphs)}
    write_json(root / KIT_GRAPHS, kits)


def matching_target_results(root: Path, graphs: Mapping[str, str]) -> dict[str, Json]:
    """Return target name → results, without the results of kits known to hold other graphs.

    Args:
        root: the run's folder.
        graphs: name → hash of the run's current graphs.
    """
    kits = _load_kit_graphs(root)
    return {
        name: results
        for name, results in load_target_results(root).items()
        if kits.get(results["kit"], {}).items() <= graphs.items()
    }


def load_target_results(root: Path) -> dict[str, Json]:
    """Return target name → results, for every target that the run in ``root`` was measured on."""
    return {path.stem: read_results(path) for path in sorted((root / FOLDER).glob("*.json"))}


def _load_kit_graphs(root: Path) -> dict[str, dict[str, str]]:
    try:
        return json.loads((root / KIT_GRAPHS).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no kit was made yet, or a power loss truncated the file
        return {}
