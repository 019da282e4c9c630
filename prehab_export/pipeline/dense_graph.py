"""Why a run has no graph of the dense model to compare its graphs with."""

from dataclasses import dataclass
from typing import Any

from prehab_export.config import NEVER

# What can be in the way of a graph that the options do not rule out.
MEMORY, DISK = "memory", "disk"


@dataclass(frozen=True)
class MissingDenseGraph:
    """Why a run has no graph of the dense model.

    cause: ``never`` if ``--dense-graph`` says so, ``memory`` or ``disk``.
    reason: the cause in words. It names no limit, so that the same cause has the same words under other limits.
    """

    cause: str
    reason: str

    @property
    def inputs(self) -> dict[str, Any]:
        """What the result of the stage ``baseline`` depends on besides the options."""
        return {} if self.cause == NEVER else {"dense_graph": self.cause}
