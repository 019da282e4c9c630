"""What a kit's runner writes, read back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.errors import InputError
from prehab_export.files import write_text_atomically
from prehab_export.workspace import KITS_MADE

FORMAT = 1
# Where a run keeps what was measured elsewhere.
FOLDER = "targets"

Json = dict[str, Any]

RESULT_KEYS = {"format", "kit", "place", "device", "parity", "cases", "drift", "comparison"}
CASE_KEYS = {"model", "case", "threads", "p50_ms", "p95_ms", "load_ms", "first_ms", "rounds"}


def read_results(path: Path, digest: str | None = None) -> Json:
    """What a runner wrote.

    Raises:
        InputError: not such a file, of another format, or of another kit.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no results file: {error}") from error
    check_results(results, str(path), digest)
    return results


def check_results(results: Any, where: str, digest: str | None = None) -> None:
    """Raises:
    InputError: not what a runner writes, or of another kit.
    """
    if not isinstance(results, dict) or not set(results) >= RESULT_KEYS or results["format"] != FORMAT:
        raise InputError(f"{where} is not what run_kit.py writes (format {FORMAT})")
    if any(not isinstance(row, dict) or not set(row) >= CASE_KEYS for row in results["cases"]):
        raise InputError(f"{where} is damaged: a case lacks figures")
    if digest is not None and results["kit"] != digest:
        raise InputError(f"{where} was measured with another kit")


def remember_kit(root: Path, digest: str, graphs: Mapping[str, str]) -> None:
    """Note by a kit's digest which graphs are in it (name → hash), so that its results can be told from those of other
    options."""
    made = _kits_made(root) | {digest: dict(graphs)}
    write_text_atomically(root / KITS_MADE, json.dumps(made, indent=1) + "\n")


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
