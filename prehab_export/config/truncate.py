"""How to truncate: the budget, the objective, how ranks are shared out."""

import re
from dataclasses import dataclass

from converters.errors import InputError
from prehab_export.config.checks import at_least, check_share, one_of

OBJECTIVES = ("weight", "activation", "fisher", "auto")
ALLOCATIONS = ("uniform", "loss")
PARAMETERS = "parameters"


@dataclass(frozen=True)
class TruncateConfig:
    """How to truncate.

    ratio: share of the selected layers' parameters to remove, in (0, 1).
    budget: what is kept to: ``parameters``, by the ratio, or ``latency:SHARE``, such as latency:0.5: the share that the
        selected layers are to take of their dense time, as measured on this machine.
    objective: what truncation minimises: ``weight`` (SVD), ``activation`` (SVD-LLM), ``fisher`` (both sides), or
        ``auto``, which measures for each kind of layer which of the last two is better.
    allocation: how ranks are shared out: ``uniform`` (same share everywhere) or ``loss`` (least summed predicted loss).
    rank_multiple: what ranks are multiples of, such as 16; or its half, quarter … where layers are too small for the
        ratio. When not given, 1, or the block of the quantised graphs that are made.
    floor_share: least share of its uniform rank that a layer gets under ``loss``.
    gradient_shrinkage: least share by which G is shrunk towards the mean of its diagonal; a small sample asks for more.
    drift_correction: fit each layer to what the compressed layers before it give, block by block.
    share_inputs: let layers with one input (q, k, v) have one ``down`` between them, where that loses less.
    """

    ratio: float = 0.6
    budget: str = PARAMETERS
    objective: str = "fisher"
    allocation: str = "loss"
    rank_multiple: int | None = None
    floor_share: float = 0.1
    gradient_shrinkage: float = 1e-2
    drift_correction: bool = True
    share_inputs: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise InputError(f"--ratio must lie between 0 and 1 (share of parameters removed), not {self.ratio}")
        if self.budget != PARAMETERS and not re.fullmatch(r"latency:0?\.\d*[1-9]\d*", self.budget):
            raise InputError(
                f"--budget must be {PARAMETERS}, or latency:SHARE with a share between 0 and 1, such as latency:0.5, "
                f"not {self.budget!r}"
            )
        if self.latency is not None and self.allocation != "loss":
            raise InputError("--budget latency needs --allocation loss: equal ranks do not know what they cost")
        one_of("--objective", self.objective, OBJECTIVES)
        one_of("--allocation", self.allocation, ALLOCATIONS)
        at_least("--rank-multiple", self.rank_multiple, 1)
        check_share("truncate.floor_share", self.floor_share)

    @property
    def multiple(self) -> int:
        """What ranks are multiples of."""
        return self.rank_multiple or 1

    @property
    def latency(self) -> float | None:
        """The share of their dense time that the layers may take; None for a budget of parameters."""
        return None if self.budget == PARAMETERS else float(self.budget.partition(":")[2])

    @property
    def keep(self) -> float:
        """The share of what the dense layers cost that is kept."""
        return 1 - self.ratio if self.latency is None else self.latency

    @property
    def goal(self) -> str:
        """The budget as the command line has it."""
        return f"--ratio {self.ratio}" if self.latency is None else f"--budget {self.budget}"

    @property
    def needs_gradients(self) -> bool:
        return self.base_objective == "fisher" or self.allocation == "loss"

    @property
    def base_objective(self) -> str:
        """The objective of a layer that no measurement has spoken for."""
        return "fisher" if self.objective == "auto" else self.objective
