"""What a kit's runner writes, read back."""

import json
from pathlib import Path
from typing import Any

from converters.errors import InputError

FORMAT = 1
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
