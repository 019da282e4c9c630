"""Which rank each layer gets, and which layers share their ``down``."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from converters.lowrank import DenseLinear, dense_weight
from prehab_export.compression.decompositions import Decompositions, Losses
from prehab_export.config import TruncateConfig
from prehab_export.linalg import Cost, Group, allocation


@dataclass(frozen=True)
class Plan:
    """Ranks by layer, None for dense; members of a ``shared`` group have one rank and one ``down``."""

    ranks: Mapping[str, int | None]
    shared: tuple[Group, ...] = ()


def plan_ranks(
    layers: Mapping[str, DenseLinear],
    decomposed: Decompositions,
    config: TruncateConfig,
    cost: Cost = allocation.parameters,
) -> Plan:
    """Ranks by the configured allocation, and which groups are to share their ``down``.

    Args:
        cost: what the budget is counted in.
    """
    return ranks_by(layers, decomposed.losses, config, cost)


def ranks_by(
    layers: Mapping[str, DenseLinear], predicted: Losses, config: TruncateConfig, cost: Cost = allocation.parameters
) -> Plan:
    """`plan_ranks` from predicted losses alone.

    Where the layers are too small to keep to the budget in whole multiples, ranks come in halves of the multiple, or in
    quarters, and so on.
    """
    shapes = {name: (layer.shape[0], layer.shape[1]) for name, layer in _weights(layers).items()}
    budget = config.keep * sum(cost(m, n, None) for m, n in shapes.values())
    multiple = config.multiple
    while True:
        if config.allocation == "uniform" or not any(bool((losses > 0).any()) for losses in predicted[0].values()):
            # Where no layer is predicted to lose anything, there is nothing to choose by.
            plan = Plan(allocation.uniform(shapes, config.keep, multiple))
            spent = sum(cost(*shape, plan.ranks[name]) for name, shape in shapes.items())
        else:
            found = allocation.by_joint_loss(shapes, *predicted, config.keep, multiple, config.floor_share, cost)
            plan, spent = Plan(found.ranks, found.shared), found.cost
        if spent <= budget * (1 + 1e-6) or multiple == 1:
            return plan
        multiple //= 2


def _weights(layers: Mapping[str, DenseLinear]) -> dict[str, Tensor]:
    return {name: dense_weight(layer) for name, layer in layers.items()}
