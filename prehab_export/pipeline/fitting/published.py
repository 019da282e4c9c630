"""What a fit has computed, each part published by itself in the run's workspace."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prehab_export.pipeline.session import Session
from prehab_export.pipeline.workspace import stage_key


class Published:
    """The results of one fit: each is read where it is there and computed where it is not."""

    def __init__(self, session: Session) -> None:
        self._workspace = session.workspace
        self._identities = {name: session.identity(name) for name in ("calibrate", "baseline")}

    def result(self, name: str, options: dict[str, Any], parents: Sequence[str], work: Callable[[Path], None]) -> Path:
        """The folder that ``work`` fills, once for these options and for the results that it reads.

        Args:
            parents: identities of those results.
        """
        key = stage_key(name, options, parents)
        if self._workspace.find(name, key) is None:
            with self._workspace.publish(name, key, options) as folder:
                work(folder)
        self._identities[name] = self._workspace.identity(name, key)
        return self._workspace.result(name, key)

    def identity(self, name: str) -> str:
        """Of a result that was asked for before, for the keys of what is made of it."""
        return self._identities[name]
