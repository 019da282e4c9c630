"""Options of truncation: budget, objective and rank allocation."""

import re
from dataclasses import dataclass

from converters.errors import InputError
from prehab_export.config.checks import check_choice, check_minimum, check_share

OBJECTIVES = ("weight", "activation", "fisher", "auto")
ALLOCATIONS = ("uniform", "loss")
PARAMETERS = "parameters"


@dataclass(frozen=True)
class TruncateConfig:
    """How to truncate.

    ratio: share of the selected layers' parameters to remove, in (0, 1).
    budget: limit on the compressed layers: ``parameters`` (set by the ratio) or ``latency:SHARE``, such as latency:0.5,
        which limits the selected layers' time to a share of their dense time, measured on this machine.
    objective: error that truncation minimises: ``weight`` (SVD), ``activation`` (SVD-LLM), ``fisher`` (weighted on both
        sides), or ``auto``, which measures whether activation or fisher is better for each kind of layer.
    allocation: how ranks are allocated: ``uniform`` (same share everywhere) or ``loss`` (least total predicted loss).
    rank_multiple: number that all ranks are multiples of, such as 16; it is halved, repeatedly if need be, for layers
        that are too small for the ratio. When not given, it is 1, or the block size of the quantised graphs.
    floor_share: minimum share of its uniform rank that a layer gets under ``loss`` allocation.
    gradient_shrinkage: minimum shrinkage of G towards the mean of its diagonal; small samples need more.
    drift_correction: fit each layer to the outputs of the compressed layers before it, block by block.
    share_inputs: let layers with the same input (q, k, v) share one ``down`` factor if that loses less.
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
            raise InputError("--budget latency needs --allocation loss: uniform allocation ignores what ranks cost")
        check_choice("--objective", self.objective, OBJECTIVES)
        check_choice("--allocation", self.allocation, ALLOCATIONS)
        check_minimum("--rank-multiple", self.rank_multiple, 1)
        check_share("truncate.floor_share", self.floor_share)

    @property
    def multiple(self) -> int:
        """The number that all ranks are multiples of."""
        return self.rank_multiple or 1

    @property
    def latency(self) -> float | None:
        """The share of the dense layers' time that the budget allows; None for a parameter budget."""
        return None if self.budget == PARAMETERS else float(self.budget.partition(":")[2])

    @property
    def keep(self) -> float:
        """The share of the dense layers' cost that the budget allows."""
        return 1 - self.ratio if self.latency is None else self.latency

    @property
    def goal(self) -> str:
        """The budget as a command-line option."""
        return f"--ratio {self.ratio}" if self.latency is None else f"--budget {self.budget}"

    @property
    def needs_gradients(self) -> bool:
        """Whether calibration must collect gradient moments."""
        return self.base_objective == "fisher" or self.allocation == "loss"

    @property
    def corrects_drift(self) -> bool:
        """Whether layers are fitted to the compressed layers before them. Plain SVD does not use the inputs."""
        return self.drift_correction and self.objective != "weight"

    @property
    def base_objective(self) -> str:
        """The objective of layers for which ``auto`` has no measurement."""
        return "fisher" if self.objective == "auto" else self.objective
