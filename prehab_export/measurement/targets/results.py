"""Reading and checking of the results that a kit's runner writes."""

import json
from pathlib import Path
from typing import Any

from converters.errors import InputError

FORMAT = 1
Json = dict[str, Any]

RESULT_KEYS = {"format", "kit", "place", "device", "parity", "cases", "drift", "comparison"}
CASE_KEYS = {"model", "case", "threads", "p50_ms", "p95_ms", "load_ms", "first_ms", "rounds"}


def read_results(path: Path, digest: str | None = None) -> Json:
    """Read the results of a runner.

    Args:
        digest: digest of the kit that the results must come from; any kit when None.

    Raises:
        InputError: the file cannot be read, is not a results file of this format, or comes from another kit.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a results file: {error}") from error
    check_results(results, str(path), digest)
    return results


def check_results(results: Any, source: str, digest: str | None = None) -> None:
    """Check the structure of results.

    Args:
        source: where the results come from, for messages.
        digest: digest of the kit that the results must come from; any kit when None.

    Raises:
        InputError: they are not the results of a runner, or come from another kit.
    """
    if not isinstance(results, dict) or not set(results) >= RESULT_KEYS or results["format"] != FORMAT:
        raise InputError(f"{source} is not a result of run_kit.py (format {FORMAT})")
    if any(not isinstance(row, dict) or not set(row) >= CASE_KEYS for row in results["cases"]):
        raise InputError(f"{source} is damaged: a case lacks figures")
    if digest is not None and results["kit"] != digest:
        raise InputError(f"{source} was measured with another kit")
