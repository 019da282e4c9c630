"""The cache of a fit's intermediate results, in the run's workspace."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prehab_export.pipeline.session import Session
from prehab_export.pipeline.workspace import stage_key


class ResultCache:
    """Computes each result of a fit once and publishes it in the workspace under its own stage name."""

    def __init__(self, session: Session) -> None:
        self._workspace = session.workspace
        self._identities = {name: session.identity(name) for name in ("calibrate", "baseline")}

    def get_or_compute(
        self, name: str, options: dict[str, Any], parents: Sequence[str], compute: Callable[[Path], None]
    ) -> Path:
        """Return the folder of a result. ``compute`` fills the folder unless the workspace has the result already.

        Args:
            options: the options that determine the result, as JSON types.
            parents: the identities of the results that ``compute`` reads.
        """
        key = stage_key(name, options, parents)
        if self._workspace.find(name, key) is None:
            with self._workspace.publish(name, key, options) as folder:
                compute(folder)
        self._identities[name] = self._workspace.identity(name, key)
        return self._workspace.result(name, key)

    def identity(self, name: str) -> str:
        """Return the identity of a result, to use as a parent of other results.

        Raises:
            KeyError: `get_or_compute` has not returned this result yet.
        """
        return self._identities[name]
