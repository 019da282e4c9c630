"""The search for the most accurate model in a budget: pure functions of measured times and predicted losses.

A setup is a kind of quantisation and a number of threads. Of each, the target told how long every layer shape takes at
a few ranks, and how long, how heavy and how large a few whole models are: the *anchors*. A candidate's request is read
off the straight lines through the anchors, at the sum of its layers' times, so that what lies outside the layers, and
what layers cost each other in the caches, is in it; its size and memory are read off in the same way, at its number of
parameters.

A budget limits at most two sums over layers, time and parameters, and ranks are given to minimise the summed predicted
loss (``allocation``). Where the best ranks for one of the two limits keep to the other as well, they are the best for
both; where they do not, both are spent as one cost, the weight between them found by bisection.
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
# Shares of their dense time at which each setup is looked at, for the whole picture.
LADDER = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
# How far inside the budget a second finalist stays, in case the first one's prediction was a little low.
MARGIN = 0.08
# Predicted to be over by more than this, a candidate is tried to prove the point; by less, it may yet turn out to fit.
HOPE = 0.2
BISECTIONS = 8


@dataclass(frozen=True, order=True)
class Setup:
    """mode: ``float32``, or a kind of quantisation. threads: of the runtime."""

    mode: str
    threads: int

    def __str__(self) -> str:
        return f"{self.mode}, {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(frozen=True)
class Line:
    """Straight lines through measured points (x, y), rising in x and made rising in y: less y at more x is noise."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]]) -> "Line":
        """
        >>> Line.through([(2, 10), (0, 4), (1, 3)]).points
        ((0, 4), (1, 4), (2, 10))
        """
        ordered = sorted(points)
        return cls(tuple(zip((x for x, _ in ordered), accumulate((y for _, y in ordered), max), strict=True)))

    def at(self, x: float) -> float:
        """y at x; beyond the points on the line of the last two, but never below 0."""
        if len(self.points) == 1:
            return self.points[0][1]
        place = next((at for at, (known, _) in enumerate(self.points) if known >= x), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[max(place, 1) - 1], self.points[max(place, 1)]
        return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1)

    def most(self, y: float, highest: float) -> float:
        """The largest x up to ``highest`` whose y is not above the given one; 0 where none is."""
        if self.at(highest) <= y:
            return highest
        low, high = 0.0, highest
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.at(middle) <= y else (low, middle)
        return low


@dataclass(frozen=True)
class Layers:
    """The selected layers: (m, n) of each, the predicted loss at ranks 0, 1, … of each, and of each group that may
    share a ``down``, at joint ranks; losses in nats."""

    shapes: Mapping[str, tuple[int, int]]
    losses: Mapping[str, Tensor]
    joint: Mapping[Group, Tensor]
    multiple: int = 1
    floor_share: float = 0.1

    @property
    def parameters(self) -> int:
        return sum(m * n for m, n in self.shapes.values())

    def units(self, ranks: Mapping[str, int | None], shared: Sequence[Group]) -> list[tuple[int, int, int | None]]:
        """(m, n, rank) of each layer, None for dense; layers with one ``down`` count as their stack."""
        grouped = {name for group in shared for name in group}
        stacks = [(sum(self.shapes[n][0] for n in g), self.shapes[g[0]][1], ranks[g[0]]) for g in shared]
        return [*stacks, *((*shape, ranks[name]) for name, shape in self.shapes.items() if name not in grouped)]

    def total(self, cost: Cost, ranks: Mapping[str, int | None], shared: Sequence[Group] = ()) -> float:
        return sum(cost(m, n, rank) for m, n, rank in self.units(ranks, shared))

    def loss(self, ranks: Mapping[str, int | None], shared: Sequence[Group] = ()) -> float:
        """The summed predicted loss."""
        grouped = {name for group in shared for name in group}
        single = {name: rank for name, rank in ranks.items() if rank is not None and name not in grouped}
        stacks = [(group, rank) for group in shared if (rank := ranks[group[0]]) is not None]
        return sum(float(self.losses[name][rank]) for name, rank in single.items()) + sum(
            float(self.joint[group][rank]) for group, rank in stacks
        )

    def dense(self, cost: Cost) -> float:
        """What the dense layers cost."""
        return sum(cost(m, n, None) for m, n in self.shapes.values())


@dataclass(frozen=True)
class Knowledge:
    """What the target told of one setup.

    cost: seconds of a layer. latency: summed seconds of the layers → p50 of a request in ms. tail: p95 over p50.
    size, memory: parameters of the selected layers → MB. penalty: what quantisation alone costs, in nats.
    """

    setup: Setup
    cost: Cost
    latency: Line
    tail: float
    size: Line
    memory: Line | None
    penalty: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """Ranks by layer, None for dense, in one setup; what is predicted of them. ``loss``: nats above the dense model."""

    setup: Setup
    ranks: Mapping[str, int | None]
    shared: tuple[Group, ...]
    share_removed: float
    loss: float
    predicted: Figures

    @property
    def key(self) -> Hashable:
        """Equal where setup and ranks are."""
        return self.setup, tuple(self.ranks.items()), self.shared

    @property
    def is_dense(self) -> bool:
        return all(rank is None for rank in self.ranks.values())

    @property
    def name(self) -> str:
        share = "dense" if self.is_dense else f"{self.share_removed:.1%} removed"
        return f"{share}, {self.setup}"

    def facts(self) -> dict:
        """As JSON types; the ranks of layers that are cut."""
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
    """The layers, and what the target told of each setup."""

    layers: Layers
    known: Mapping[Setup, Knowledge]

    @cached_property
    def uncut(self) -> list[Candidate]:
        """The dense model in every setup."""
        ranks: dict[str, int | None] = dict.fromkeys(self.layers.shapes)
        return [self.candidate(knowledge, ranks) for knowledge in self.known.values()]

    def candidate(
        self, known: Knowledge, ranks: Mapping[str, int | None], shared: tuple[Group, ...] = (), loss: float = 0.0
    ) -> Candidate:
        """With what is predicted of it."""
        layers = self.layers
        numbers = layers.total(parameters, ranks, shared)
        p50 = known.latency.at(layers.total(known.cost, ranks, shared))
        figures = Figures(
            p50_ms=p50,
            p95_ms=p50 * known.tail,
            memory_mb=None if known.memory is None else known.memory.at(numbers),
            size_mb=known.size.at(numbers),
        )
        removed = 1 - numbers / layers.parameters
        return Candidate(known.setup, ranks, shared, removed, loss + known.penalty, figures)

    def allocated(self, known: Knowledge, cost: Cost, keep: float) -> Candidate:
        """The least predicted loss for ``keep`` of what the dense layers cost."""
        layers = self.layers
        found = by_joint_loss(
            layers.shapes, layers.losses, layers.joint, keep, layers.multiple, layers.floor_share, cost
        )
        return self.candidate(known, found.ranks, found.shared, found.predicted_loss)

    def within(self, known: Knowledge, budget: Budget) -> Candidate:
        """The least predicted loss of a setup within the budget, or what comes nearest to it.

        Of the limits, the accuracy's is left aside: it is judged by measurement.
        """
        caps = self._caps(known, budget)
        single = [self.allocated(known, cost, cap / self.layers.dense(cost)) for cost, cap in caps]
        fitting = [candidate for candidate in single if not budget.misses(candidate.predicted)]
        if fitting or len(caps) < 2:
            # One that was best under a part of the limits and keeps to all of them is best under all of them.
            return min(fitting or single, key=lambda c: (budget.distance(c.predicted), c.loss))
        return self._under_both(known, budget, caps, single)

    def _caps(self, known: Knowledge, budget: Budget) -> list[tuple[Cost, float]]:
        """What the layers may cost: seconds, parameters."""
        seconds, numbers = self.layers.dense(known.cost), float(self.layers.parameters)
        caps: list[tuple[Cost, float]] = []
        if budget.p95_ms is not None:
            caps.append((known.cost, known.latency.most(budget.p95_ms / known.tail, seconds)))
        limits = [known.size.most(budget.size_mb, numbers)] if budget.size_mb is not None else []
        if budget.memory_mb is not None and known.memory is not None:
            limits.append(known.memory.most(budget.memory_mb, numbers))
        return [*caps, (parameters, min(limits))] if limits else caps or [(known.cost, seconds)]

    def _under_both(
        self, known: Knowledge, budget: Budget, caps: Sequence[tuple[Cost, float]], found: list[Candidate]
    ) -> Candidate:
        (time, most_time), (_, most_numbers) = caps
        light, heavy = 0.0, 1.0  # the weight of time: too small at the one end, too large at the other
        for _ in range(BISECTIONS):
            weight = (light + heavy) / 2
            mixed = _mixed(time, most_time, most_numbers, weight)
            candidate = self.allocated(known, mixed, 1 / self.layers.dense(mixed))
            found.append(candidate)
            slow = self.layers.total(time, candidate.ranks, candidate.shared) > most_time
            light, heavy = (weight, heavy) if slow else (light, weight)
        return min(found, key=lambda c: (budget.distance(c.predicted), c.loss))

    def ladder(self, known: Knowledge) -> list[Candidate]:
        """Candidates over the whole range of times, for the picture and the table."""
        return [self.allocated(known, known.cost, keep) for keep in LADDER]

    def all(self, budget: Budget, progress: Progress = silent) -> list[Candidate]:
        """Every candidate: dense, over the whole range, and at the budget and a little inside it."""
        found = list(self.uncut)
        with progress("search", len(self.known)) as advance:
            for setup, known in self.known.items():
                inside = tightened(budget, MARGIN)
                with step(advance, str(setup)):
                    found += [*self.ladder(known), self.within(known, budget), self.within(known, inside)]
        return distinct(found)


def _mixed(time: Cost, most_time: float, most_numbers: float, weight: float) -> Cost:
    """Time and parameters as one cost, of which 1 may be spent."""
    seconds, numbers = max(most_time, 1e-12), max(most_numbers, 1.0)
    return lambda m, n, rank: weight * time(m, n, rank) / seconds + (1 - weight) * parameters(m, n, rank) / numbers


def tightened(budget: Budget, margin: float) -> Budget:
    """Limits on what the device costs, that share lower."""

    def lower(limit: float | None) -> float | None:
        return None if limit is None else limit * (1 - margin)

    return Budget(lower(budget.p95_ms), lower(budget.memory_mb), lower(budget.size_mb), budget.max_drop)


def corrected(budget: Budget, tried: Sequence[tuple[Candidate, Figures]]) -> Budget:
    """The limits that predictions have to keep to, where models turned out dearer than predicted: each lower by the
    largest ratio of measured to predicted."""

    def lower(limit: float | None, name: str) -> float | None:
        pairs = [(getattr(own, name), getattr(candidate.predicted, name)) for candidate, own in tried]
        ratios = [found / expected for found, expected in pairs if found is not None and expected]
        return None if limit is None else limit / max([1.0, *ratios])

    return Budget(
        lower(budget.p95_ms, "p95_ms"),
        lower(budget.memory_mb, "memory_mb"),
        lower(budget.size_mb, "size_mb"),
        budget.max_drop,
    )


def distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Each setup with the same ranks once, in the order given."""
    found: dict[Hashable, Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.key, candidate)
    return list(found.values())


def finalists(candidates: Sequence[Candidate], budget: Budget, count: int = 3) -> list[Candidate]:
    """Those to try for real, best first: the least predicted loss within the budget, the least that is a margin inside
    it, and the least of another setup; the dense model alone where it is well within. Where none is within, those that
    come nearest, or the nearest alone where that is far off."""
    fitting = sorted(
        (c for c in candidates if not budget.misses(c.predicted)), key=lambda c: (c.loss, c.predicted.p95_ms)
    )
    if not fitting:
        near = sorted(candidates, key=lambda c: (budget.distance(c.predicted), c.loss))
        return near[: count if budget.distance(near[0].predicted) < HOPE else 1]
    tight = tightened(budget, MARGIN)
    best = fitting[0]
    if best.is_dense and best.setup.mode == FLOAT32 and not tight.misses(best.predicted):
        return [best]  # nothing needs to be lost
    safe = next((c for c in fitting if not tight.misses(c.predicted)), best)
    other = next((c for c in fitting if c.setup != best.setup), best)
    return distinct([best, safe, other, *fitting])[:count] if count > 1 else [best]


def chosen(tried: Sequence[tuple[Candidate, Figures]], budget: Budget) -> Candidate | None:
    """Of what was measured and keeps to the budget the most accurate, then the fastest; None where nothing does. The
    dense model, where it keeps to the budget, is the answer: what seems more accurate is luck of the sample."""
    fitting = [(candidate, own) for candidate, own in tried if not budget.misses(own)]
    dense = [pair for pair in fitting if pair[0].is_dense and pair[0].setup.mode == FLOAT32]
    best = min(dense or fitting, key=lambda pair: (pair[1].drop or 0.0, pair[1].p95_ms), default=None)
    return None if best is None else best[0]


def pareto(rows: Sequence[tuple[float, ...]]) -> list[bool]:
    """Which rows no other row beats: no worse in every column and better in one; less is better.

    >>> pareto([(1, 2), (2, 1), (2, 2)])
    [True, True, False]
    """

    def beaten(row: tuple[float, ...]) -> bool:
        return any(other != row and all(a <= b for a, b in zip(other, row, strict=True)) for other in rows)

    return [not beaten(row) for row in rows]
