"""What was measured of a run at targets: kept in the run's folder, told from results of other options."""

import json
from collections.abc import Mapping
from pathlib import Path

from prehab_export.measurement import Json, read_results
from prehab_export.pipeline.workspace import KITS_MADE
from prehab_export.system import write_json

# Where a run keeps what was measured elsewhere.
FOLDER = "targets"


def remember_kit(root: Path, digest: str, graphs: Mapping[str, str]) -> None:
    """Note by a kit's digest which graphs are in it (name → hash), so that its results can be told from those of other
    options."""
    made = _kits_made(root) | {digest: dict(graphs)}
    write_json(root / KITS_MADE, made)


def results_of(root: Path, graphs: Mapping[str, str]) -> dict[str, Json]:
    """`kept_results`, but for those of kits that are known to hold other graphs than these (name → hash)."""
    made = _kits_made(root)
    return {
        name: results
        for name, results in kept_results(root).items()
        if made.get(results["kit"], {}).items() <= graphs.items()
    }


def _kits_made(root: Path) -> dict[str, dict[str, str]]:
    try:
        return json.loads((root / KITS_MADE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or what a machine that lost its power left
        return {}


def kept_results(root: Path) -> dict[str, Json]:
    """Name → results of every target that the run in ``root`` was measured at."""
    return {path.stem: read_results(path) for path in sorted((root / FOLDER).glob("*.json"))}
