"""The search for the most accurate model within a budget.

The search consists of pure functions of measured times and predicted losses. A setup is a kind of quantisation and a
number of threads. For each setup, the survey measures the time of every layer shape at a few ranks, and the time,
memory and file size of a few complete models, the *anchors*.

The search predicts a candidate's latency from the summed times of its layers, by interpolation between the anchors.
The interpolation accounts for the work outside the layers and for the effect of the layers on each other's caches. The
search predicts size and memory in the same way, from the number of parameters.

A budget limits at most two sums over the layers: time and parameters. For each limit the search allocates ranks with
the lowest summed predicted loss. If the allocation for one limit also meets the other limit, it is optimal for both.
Otherwise the search combines the two costs into a weighted cost and finds the weight by bisection.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate

from torch import Tensor

from prehab_export.config import Budget, Figures
from prehab_export.linalg import Cost, Group, by_joint_loss, parameters
from prehab_export.system import Progress, silent, step

FLOAT32 = "float32"
# Shares of the dense layers' time at which the search makes candidates in every setup, whatever the budget.
TIME_SHARES = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
# Share by which a second finalist stays below the limits, in case the first finalist's prediction is too low.
SAFETY_MARGIN = 0.08
# A candidate that is predicted to exceed the budget by less than this share may still turn out to meet it.
NEAR_MISS = 0.2
BISECTIONS = 8


@dataclass(frozen=True, order=True)
class Setup:
    """How a model runs.

    mode: ``float32``, or a kind of quantisation.
    threads: threads of the runtime.
    """

    mode: str
    threads: int

    def __str__(self) -> str:
        return f"{self.mode}, {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(frozen=True)
class Line:
    """A non-decreasing piecewise linear function through measured points (x, y), sorted by x."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]]) -> "Line":
        """Return the function through the points. A y that falls as x rises counts as noise and is raised.

        >>> Line.through([(2, 10), (0, 4), (1, 3)]).points
        ((0, 4), (1, 4), (2, 10))
        """
        ordered = sorted(points)
        return cls(tuple(zip((x for x, _ in ordered), accumulate((y for _, y in ordered), max), strict=True)))

    def at(self, x: float) -> float:
        """Return y at x. Outside the points, extrapolate the nearest segment, but never below 0."""
        if len(self.points) == 1:
            return self.points[0][1]
        index = next((index for index, (known_x, _) in enumerate(self.points) if known_x >= x), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[max(index, 1) - 1], self.points[max(index, 1)]
        return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1)

    def largest_x(self, y: float, upper: float) -> float:
        """Return the largest x between 0 and ``upper`` at which the function does not exceed ``y``, or 0 if it always
        does."""
        if self.at(upper) <= y:
            return upper
        low, high = 0.0, upper
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.at(middle) <= y else (low, middle)
        return low


@dataclass(frozen=True)
class Layers:
    """The selected layers and their predicted losses in nats.

    shapes: the shape (m, n) of each layer.
    losses: the predicted loss of each layer at ranks 0, 1, ….
    joint_losses: the predicted loss, at joint ranks 0, 1, …, of each group of layers that may share a ``down``.
    rank_multiple: ranks are multiples of this number.
    floor_share: the smallest rank, as a share of the rank of a uniform allocation.
    """

    shapes: Mapping[str, tuple[int, int]]
    losses: Mapping[str, Tensor]
    joint_losses: Mapping[Group, Tensor]
    rank_multiple: int = 1
    floor_share: float = 0.1

    @property
    def parameters(self) -> int:
        """The number of parameters of the dense layers."""
        return sum(m * n for m, n in self.shapes.values())

    def units(self, ranks: Mapping[str, int | None], shared: Sequence[Group]) -> list[tuple[int, int, int | None]]:
        """Return (m, n, rank) of each layer; the rank is None for a dense layer. Layers that share a ``down`` count as
        one stacked layer."""
        grouped = {name for group in shared for name in group}
        stacks = [(sum(self.shapes[n][0] for n in g), self.shapes[g[0]][1], ranks[g[0]]) for g in shared]
        return [*stacks, *((*shape, ranks[name]) for name, shape in self.shapes.items() if name not in grouped)]

    def total_cost(self, cost: Cost, ranks: Mapping[str, int | None], shared: Sequence[Group] = ()) -> float:
        """Return the summed cost of the layers at the given ranks."""
        return sum(cost(m, n, rank) for m, n, rank in self.units(ranks, shared))

    def dense_cost(self, cost: Cost) -> float:
        """Return the summed cost of the dense layers."""
        return sum(cost(m, n, None) for m, n in self.shapes.values())

    def loss(self, ranks: Mapping[str, int | None], shared: Sequence[Group] = ()) -> float:
        """Return the summed predicted loss of the layers at the given ranks, in nats."""
        grouped = {name for group in shared for name in group}
        single = {name: rank for name, rank in ranks.items() if rank is not None and name not in grouped}
        stacks = [(group, rank) for group in shared if (rank := ranks[group[0]]) is not None]
        return sum(float(self.losses[name][rank]) for name, rank in single.items()) + sum(
            float(self.joint_losses[group][rank]) for group, rank in stacks
        )


@dataclass(frozen=True)
class CostModel:
    """Predicts what a model costs in one setup, from measurements at the target.

    layer_seconds: the time of one layer, in seconds.
    latency: maps the summed seconds of the layers to the p50 of a request, in ms.
    tail_ratio: p95 divided by p50.
    size: maps the parameters of the selected layers to the file size, in MB.
    memory: maps the parameters of the selected layers to the peak memory, in MB; None if the target does not report
        memory.
    penalty: the loss that quantisation alone adds, in nats.
    """

    setup: Setup
    layer_seconds: Cost
    latency: Line
    tail_ratio: float
    size: Line
    memory: Line | None
    penalty: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A choice of ranks in one setup, with its predictions.

    ranks: the rank of each layer; None for a dense layer.
    shared: groups of layers that share a ``down``.
    share_removed: the removed share of the selected layers' parameters.
    loss: the predicted loss above the loss of the dense model, in nats.
    """

    setup: Setup
    ranks: Mapping[str, int | None]
    shared: tuple[Group, ...]
    share_removed: float
    loss: float
    predicted: Figures

    @property
    def key(self) -> Hashable:
        """A value that is equal for candidates with the same setup, ranks and groups."""
        return self.setup, tuple(self.ranks.items()), self.shared

    @property
    def is_dense(self) -> bool:
        return all(rank is None for rank in self.ranks.values())

    @property
    def name(self) -> str:
        share = "dense" if self.is_dense else f"{self.share_removed:.1%} removed"
        return f"{share}, {self.setup}"

    def facts(self) -> dict:
        """Return the candidate as JSON types. The ranks include only the factored layers."""
        return {
            "name": self.name,
            **asdict(self.setup),
            "share_removed": self.share_removed,
            "predicted_loss_rise": self.loss,
            "predicted": asdict(self.predicted),
            "ranks": {name: rank for name, rank in self.ranks.items() if rank is not None},
            "shared_inputs": [list(group) for group in self.shared],
        }


@dataclass(frozen=True)
class Search:
    """Makes candidates for a budget from the layers' predicted losses and a cost model for each setup."""

    layers: Layers
    cost_models: Mapping[Setup, CostModel]

    @cached_property
    def dense_candidates(self) -> list[Candidate]:
        """The dense model in every setup."""
        ranks: dict[str, int | None] = dict.fromkeys(self.layers.shapes)
        return [self.predict(cost_model, ranks) for cost_model in self.cost_models.values()]

    def predict(
        self, cost_model: CostModel, ranks: Mapping[str, int | None], shared: tuple[Group, ...] = (), loss: float = 0.0
    ) -> Candidate:
        """Return a candidate with its predicted figures.

        Args:
            loss: the predicted loss of the ranks, in nats, without the penalty of quantisation.
        """
        layers = self.layers
        count = layers.total_cost(parameters, ranks, shared)
        p50 = cost_model.latency.at(layers.total_cost(cost_model.layer_seconds, ranks, shared))
        figures = Figures(
            p50_ms=p50,
            p95_ms=p50 * cost_model.tail_ratio,
            memory_mb=None if cost_model.memory is None else cost_model.memory.at(count),
            size_mb=cost_model.size.at(count),
        )
        share_removed = 1 - count / layers.parameters
        return Candidate(cost_model.setup, ranks, shared, share_removed, loss + cost_model.penalty, figures)

    def allocate(self, cost_model: CostModel, cost: Cost, keep: float) -> Candidate:
        """Return the candidate with the lowest predicted loss whose cost is at most the share ``keep`` of the dense
        layers' cost."""
        layers = self.layers
        allocation = by_joint_loss(
            layers.shapes, layers.losses, layers.joint_losses, keep, layers.rank_multiple, layers.floor_share, cost
        )
        return self.predict(cost_model, allocation.ranks, allocation.shared, allocation.predicted_loss)

    def best_within(self, cost_model: CostModel, budget: Budget) -> Candidate:
        """Return the candidate with the lowest predicted loss within the budget, or the candidate nearest to it.

        The limit on accuracy is ignored because it can only be checked by measurement.
        """
        limits = self._cost_limits(cost_model, budget)
        candidates = [self.allocate(cost_model, cost, limit / self.layers.dense_cost(cost)) for cost, limit in limits]
        fitting = [candidate for candidate in candidates if not budget.misses(candidate.predicted)]
        if fitting or len(limits) < 2:
            # A candidate that is optimal under one limit and meets both limits is optimal under both.
            return min(fitting or candidates, key=lambda c: (budget.distance(c.predicted), c.loss))
        return self._bisect_weight(cost_model, budget, limits, candidates)

    def _cost_limits(self, cost_model: CostModel, budget: Budget) -> list[tuple[Cost, float]]:
        """Return each cost that the budget limits, in seconds or parameters, with its limit for all layers."""
        dense_seconds, count = self.layers.dense_cost(cost_model.layer_seconds), float(self.layers.parameters)
        limits: list[tuple[Cost, float]] = []
        if budget.p95_ms is not None:
            p50_limit = budget.p95_ms / cost_model.tail_ratio
            limits.append((cost_model.layer_seconds, cost_model.latency.largest_x(p50_limit, dense_seconds)))
        count_limits = [cost_model.size.largest_x(budget.size_mb, count)] if budget.size_mb is not None else []
        if budget.memory_mb is not None and cost_model.memory is not None:
            count_limits.append(cost_model.memory.largest_x(budget.memory_mb, count))
        if count_limits:
            limits.append((parameters, min(count_limits)))
        return limits or [(cost_model.layer_seconds, dense_seconds)]

    def _bisect_weight(
        self,
        cost_model: CostModel,
        budget: Budget,
        limits: Sequence[tuple[Cost, float]],
        candidates: Sequence[Candidate],
    ) -> Candidate:
        """Return the best of the candidates and of the allocations under weighted sums of both costs."""
        (seconds, seconds_limit), (_, count_limit) = limits
        candidates = [*candidates]
        low, high = 0.0, 1.0  # the weight of time: too small at the lower end, too large at the upper end
        for _ in range(BISECTIONS):
            weight = (low + high) / 2
            weighted = _weighted_cost(seconds, seconds_limit, count_limit, weight)
            candidate = self.allocate(cost_model, weighted, 1 / self.layers.dense_cost(weighted))
            candidates.append(candidate)
            too_slow = self.layers.total_cost(seconds, candidate.ranks, candidate.shared) > seconds_limit
            low, high = (weight, high) if too_slow else (low, weight)
        return min(candidates, key=lambda c: (budget.distance(c.predicted), c.loss))

    def time_series(self, cost_model: CostModel) -> list[Candidate]:
        """Return candidates over the full range of times, for the plot and the table."""
        return [self.allocate(cost_model, cost_model.layer_seconds, keep) for keep in TIME_SHARES]

    def candidates(self, budget: Budget, progress: Progress = silent) -> list[Candidate]:
        """Return all distinct candidates: dense, over the full range of times, and for the budget with and without a
        safety margin."""
        candidates = list(self.dense_candidates)
        tight_budget = tighten(budget, SAFETY_MARGIN)
        with progress("search", len(self.cost_models)) as advance:
            for setup, cost_model in self.cost_models.items():
                with step(advance, str(setup)):
                    candidates += self.time_series(cost_model)
                    candidates += [self.best_within(cost_model, limits) for limits in (budget, tight_budget)]
        return unique(candidates)


def _weighted_cost(seconds: Cost, seconds_limit: float, count_limit: float, weight: float) -> Cost:
    """Combine time and parameters into one cost with a limit of 1."""
    seconds_limit, count_limit = max(seconds_limit, 1e-12), max(count_limit, 1.0)
    return lambda m, n, rank: (
        weight * seconds(m, n, rank) / seconds_limit + (1 - weight) * parameters(m, n, rank) / count_limit
    )


def tighten(budget: Budget, margin: float) -> Budget:
    """Lower the limits on time, memory and size by the share ``margin``."""

    def lower(limit: float | None) -> float | None:
        return None if limit is None else limit * (1 - margin)

    return Budget(lower(budget.p95_ms), lower(budget.memory_mb), lower(budget.size_mb), budget.max_drop)


def correct_limits(budget: Budget, measurements: Sequence[tuple[Candidate, Figures]]) -> Budget:
    """Lower each limit by the largest ratio of a measured to a predicted figure, so that predictions that are too low
    by this ratio still lead to models within the budget."""

    def lower(limit: float | None, name: str) -> float | None:
        pairs = [(getattr(measured, name), getattr(candidate.predicted, name)) for candidate, measured in measurements]
        ratios = [measured / predicted for measured, predicted in pairs if measured is not None and predicted]
        return None if limit is None else limit / max([1.0, *ratios])

    return Budget(
        lower(budget.p95_ms, "p95_ms"),
        lower(budget.memory_mb, "memory_mb"),
        lower(budget.size_mb, "size_mb"),
        budget.max_drop,
    )


def unique(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates without duplicates, in their original order."""
    by_key: dict[Hashable, Candidate] = {}
    for candidate in candidates:
        by_key.setdefault(candidate.key, candidate)
    return list(by_key.values())


def select_finalists(candidates: Sequence[Candidate], budget: Budget, count: int = 3) -> list[Candidate]:
    """Return the candidates to make and measure, best first.

    The finalists are the candidate with the lowest predicted loss within the budget, the best candidate within the
    budget less a safety margin, and the best candidate of another setup. If the dense float32 model is within the
    budget by the safety margin, it is the only finalist. If no candidate is within the budget, the finalists are the
    nearest candidates, or only the nearest one if it is far off.
    """
    fitting = sorted(
        (c for c in candidates if not budget.misses(c.predicted)), key=lambda c: (c.loss, c.predicted.p95_ms)
    )
    if not fitting:
        nearest = sorted(candidates, key=lambda c: (budget.distance(c.predicted), c.loss))
        return nearest[: count if budget.distance(nearest[0].predicted) < NEAR_MISS else 1]
    tight_budget = tighten(budget, SAFETY_MARGIN)
    best = fitting[0]
    if best.is_dense and best.setup.mode == FLOAT32 and not tight_budget.misses(best.predicted):
        return [best]
    safe = next((c for c in fitting if not tight_budget.misses(c.predicted)), best)
    other_setup = next((c for c in fitting if c.setup != best.setup), best)
    return unique([best, safe, other_setup, *fitting])[:count] if count > 1 else [best]


def select_best(measurements: Sequence[tuple[Candidate, Figures]], budget: Budget) -> Candidate | None:
    """Return the most accurate measured candidate within the budget, or None if there is none.

    Ties go to the faster candidate. The dense float32 model wins if it is within the budget: a candidate that seems
    more accurate owes this to the evaluation sample.
    """
    fitting = [(candidate, measured) for candidate, measured in measurements if not budget.misses(measured)]
    dense = [pair for pair in fitting if pair[0].is_dense and pair[0].setup.mode == FLOAT32]
    best = min(dense or fitting, key=lambda pair: (pair[1].drop or 0.0, pair[1].p95_ms), default=None)
    return None if best is None else best[0]


def pareto_mask(rows: Sequence[tuple[float, ...]]) -> list[bool]:
    """Return, for each row, whether it is Pareto optimal. Lower values are better.

    >>> pareto_mask([(1, 2), (2, 1), (2, 2)])
    [True, True, False]
    """

    def is_dominated(row: tuple[float, ...]) -> bool:
        return any(other != row and all(a <= b for a, b in zip(other, row, strict=True)) for other in rows)

    return [not is_dominated(row) for row in rows]
