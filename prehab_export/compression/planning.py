"""Plans which rank each layer gets, and which layers share their ``down``."""

from collections.abc import Mapping
from dataclasses import dataclass

from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.decompositions import Decompositions, Losses
from prehab_export.config import TruncateConfig
from prehab_export.linalg import Cost, Group, by_joint_loss, parameters, uniform


@dataclass(frozen=True)
class RankPlan:
    """The rank of every layer, None for dense; members of a ``shared`` group have one rank and one ``down``."""

    ranks: Mapping[str, int | None]
    shared: tuple[Group, ...] = ()


def plan_ranks(calibrated: Calibrated, decomposed: Decompositions, config: TruncateConfig) -> RankPlan:
    """Choose ranks by the configured allocation, and the groups that share their ``down``."""
    return ranks_by(calibrated.shapes, decomposed.losses, config, calibrated.cost)


def ranks_by(
    shapes: Mapping[str, tuple[int, int]], predicted: Losses, config: TruncateConfig, cost: Cost = parameters
) -> RankPlan:
    """Choose ranks as in `plan_ranks`, from shapes (m, n) and predicted losses alone.

    If the layers are too small to meet the budget with ranks in whole multiples, the multiple is halved until they do,
    or until it is 1.
    """
    budget = config.keep * sum(cost(m, n, None) for m, n in shapes.values())
    multiple = config.multiple
    while True:
        if config.allocation == "uniform" or not any(bool((losses > 0).any()) for losses in predicted[0].values()):
            # If no layer is predicted to lose anything, the losses give no reason to prefer one layer over another.
            plan = RankPlan(uniform(shapes, config.keep, multiple))
            spent = sum(cost(*shape, plan.ranks[name]) for name, shape in shapes.items())
        else:
            allocation = by_joint_loss(shapes, *predicted, config.keep, multiple, config.floor_share, cost)
            plan, spent = RankPlan(allocation.ranks, allocation.shared), allocation.cost
        if spent <= budget * (1 + 1e-6) or multiple == 1:
            return plan
        multiple //= 2
