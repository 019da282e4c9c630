"""Truncation that knows what the layers before it have become.

A layer behind compressed ones sees x', not x. Taken block by block and input by input, each layer is fitted to what
the dense model computes from *its* inputs: with moments centred where a bias takes the mean,

    minimise E‖G^½ (y − Ŵ x')‖²,   y = W x (+ h − h' for a layer that writes to a residual stream h)
    W* = (E[y x'ᵀ] + εW) (C' + εI)⁻¹,   C' = E[x' x'ᵀ]
    Ŵ  = the best rank-r factors of W* in the metric (C', G)

The anchored solution without h and with G = I is that of AA-SVD (arXiv 2604.02119) and SAES-SVD. Two things are added.
The gradient moment G weighs the outputs, as in plain truncation. And a layer that writes to a residual stream makes
up for what the stream itself has lost so far: its target moves by the stream's drift, so that errors are corrected
at every block rather than carried to the end. The ridge ε pulls W* towards W, not towards zero, in directions that
the sample hardly shows.

Ranks and objectives come from the truncation of the dense model (``truncation.truncate``), and so do the factors of
layers that this cannot reach: those outside the blocks, and those that see other tokens in the two models (experts).
Which ones and why is said in the result's notes.

Where the same block is run many times (ALBERT), a layer's input depends on its own factors, and there is no order in
which each layer comes after all that it depends on. There, and where blocks are no chain, the whole models are run
instead of one block, and a layer is fitted to the inputs of all its runs together:

    minimise Σ_k E‖G^½ (y_k − Ŵ x'_k)‖²,   x'_k the input of run k in a student that has factors everywhere

which is the same regression with E[x' x'ᵀ], E[y x'ᵀ] and the means taken over all runs. Of what the stream has lost,
h − h', a layer that runs many times makes up nothing: it would do so once for every run, and too much. The student
starts with the plan's factors. Layers are fitted one input after the other in the order in which they first run, each
to a student with the latest factors of all others, in ``SWEEPS`` rounds. Nothing promises that a step is for the
better; so the model's output is compared with the dense one's on the sample (KL divergence per unit) after every one,
and the best of all steps and of the plan itself is kept.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from math import inf, isfinite

import torch
from torch import Tensor, nn

from converters.lowrank import DenseLinear, Factors, dense_weight, factorize, factors_of
from converters.roots import damped, scale_of
from prehab_export.compression.activations import frozen
from prehab_export.compression.block_walk import BlockWalk
from prehab_export.compression.blocks import Block, NotAChain, Seen, find_blocks
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.metric import gradient_metric, input_metric
from prehab_export.compression.model_walk import ModelWalk
from prehab_export.compression.moments import centred
from prehab_export.compression.training import divergence, frozen_copy
from prehab_export.compression.truncation import Refit, Truncation, stored_factors
from prehab_export.inputs import Batch, Task
from prehab_export.linalg import Group, decompose, decompose_jointly, objective_value, valid_rows
from prehab_export.system import Advance, Progress, silent

# ε as a share of the mean diagonal of C'.
RIDGE = 1e-2
# Rounds over the layers of a model that is run as a whole, and the most inputs for which that is worth its time: each
# costs a forward pass of both models over the whole sample.
SWEEPS = 2
MOST_INPUTS = 24


@dataclass
class _Moments:
    """Sums over tokens for the layers of one input, float64; x is the dense model's input, x' the student's."""

    outer: Tensor  # n×n: x' x'ᵀ
    cross: Tensor  # n×n: x x'ᵀ
    dense: Tensor  # n: x
    student: Tensor  # n: x'
    drift_cross: dict[str, Tensor] = field(default_factory=dict)  # m×n a layer: (h − h') x'ᵀ
    drift: dict[str, Tensor] = field(default_factory=dict)  # m a layer: h − h'
    tokens: int = 0

    @classmethod
    def zero(cls, width: int, device: torch.device) -> "_Moments":
        square, flat = (torch.zeros(*shape, dtype=torch.float64, device=device) for shape in ((width, width), (width,)))
        return cls(square, square.clone(), flat, flat.clone())

    def add_drift(self, name: str, cross: Tensor, total: Tensor) -> None:
        if name in self.drift:
            self.drift_cross[name] += cross
            self.drift[name] += total
        else:
            self.drift_cross[name], self.drift[name] = cross.double(), total.double()


@dataclass(frozen=True)
class _Regression:
    """Regression of one layer on x': W* (m×n), its metric (n×n), and how its bias follows from the weight chosen."""

    weight: Tensor
    second_moment: Tensor
    output_mean: Tensor  # m: mean of y − bias
    input_mean: Tensor | None  # n: mean of x'; None where no bias can take it

    def bias(self, old: Tensor | None, *matrices: Tensor) -> Tensor | None:
        """The bias that goes with the product of these matrices as the weight."""
        if old is None or self.input_mean is None:
            return None
        applied = reduce(lambda x, matrix: matrix @ x, reversed(matrices), self.input_mean)
        return (old.double() + self.output_mean - applied).to(old.dtype)


@torch.no_grad()
def truncate_along(
    calibrated: Calibrated,
    batches: Iterable[Batch],
    plan: Truncation,
    *,
    gradient_shrinkage: float,
    after_block: Callable[[BlockWalk, Block], None] | None = None,
    progress: Progress = silent,
) -> Truncation:
    """The truncation ``plan`` again, each layer fitted to the inputs that the compressed model gives it.

    Args:
        calibrated: the dense model, left as it is, and its moments.
        batches: the calibration sample.
        plan: ranks and objectives of every layer.
        gradient_shrinkage: as in ``TruncateConfig``.
        after_block: called when a block of the student has its factors, before the walk goes on.

    Returns:
        The truncation; its notes say what was left as planned, and why.

    Raises:
        NotAChain: the model's blocks cannot be run one by one, and there are too many layers for whole passes.
    """
    kept, fitter = list(batches), _Fitter(calibrated, plan, gradient_shrinkage)
    with frozen(calibrated.model), progress("truncate", len(calibrated.layers)) as advance:
        try:
            return _block_by_block(fitter, kept, after_block, advance)
        except NotAChain as reason:
            return _along_whole_passes(fitter, kept, reason, after_block is not None, advance)


def _block_by_block(
    fitter: "_Fitter",
    batches: Sequence[Batch],
    after_block: Callable[[BlockWalk, Block], None] | None,
    advance: Advance,
) -> Truncation:
    """Raises:
    NotAChain: the model's blocks cannot be run one by one.
    """
    model, plan, layers = fitter.calibrated.model, fitter.plan, fitter.calibrated.layers
    blocks = find_blocks(model, layers)
    inside = {name for block in blocks for name in block.layers}
    student = frozen_copy(model)
    factorize(student, {name: pair for name, pair in plan.factors.items() if name not in inside})
    if not blocks:
        raise NotAChain("the model has no list of blocks (nn.ModuleList) with these layers in it")
    walk = BlockWalk(model, student, fitter.calibrated.task, batches, blocks)
    results = {result.name: result for result in plan.layers}
    refits: dict[str, Refit] = {}
    unfitted: list[str] = []
    done: set[str] = set()
    for block in blocks:
        for together in fitter.by_input(walk.order[block.name]):
            # One input may be that of layers in several blocks; those with one ``down`` are fitted at the first.
            members = [name for name in together if name not in done]
            if not members:
                continue
            done |= {name for unit in _units(members, plan.shared) for name in unit}
            moments = _gather(walk.observe(block, members), members)
            if moments is None:
                part = _planned(members, plan)
                unfitted += members
            else:
                part = fitter.fitted(members, moments)
            part.apply(student)
            refits |= part.refits
            results |= {result.name: result for result in part.layers}
            advance(len(members))
        if after_block is not None:
            after_block(walk, block)
        walk.advance(block)
    notes = [
        *_note("which may see other tokens in the compressed model", unfitted),
        *_note("outside the repeated blocks", [name for name in layers if name not in inside]),
    ]
    return Truncation(factors_of(student), list(results.values()), refits, plan.shared, tuple(notes))


def _note(why: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"drift is not corrected for {names[0]}{more}, {why}"]


def _along_whole_passes(
    fitter: "_Fitter", batches: Sequence[Batch], reason: NotAChain, refines_blocks: bool, advance: Advance
) -> Truncation:
    """`truncate_along` where blocks cannot be run one by one, for the given reason.

    Raises:
        NotAChain: there are too many layers for whole passes.
    """
    model, task, plan = fitter.calibrated.model, fitter.calibrated.task, fitter.plan
    walk = ModelWalk(model, task, batches, list(fitter.calibrated.layers))
    inputs = fitter.by_input(walk.order)
    if len(inputs) == 1 and not walk.repeats:
        return plan  # nothing comes after anything
    if len(inputs) > MOST_INPUTS:
        raise NotAChain(
            f"{reason}, and with {len(inputs)} inputs of layers it would take as many passes of the whole model"
        )
    best = current = plan
    least = _distance(model, plan, task, walk.batches)
    unfitted: dict[str, None] = {}
    for sweep in range(SWEEPS):
        for members in inputs:
            moments = _gather(walk.observe(current.apply(frozen_copy(model)), members), members)
            if moments is None:
                unfitted |= dict.fromkeys(members)
            else:
                part = fitter.fitted(members, moments)
                results = {result.name: result for result in (*current.layers, *part.layers)}
                current = replace(
                    current,
                    factors=current.factors | part.factors,
                    refits=current.refits | part.refits,
                    layers=list(results.values()),
                )
                if (distance := _distance(model, current, task, walk.batches)) < least:
                    best, least = current, distance
            if sweep == 0:
                advance(len(members))
    notes = [f"drift is corrected by passes of the whole model: {reason}"]
    if best is plan:
        notes = [f"drift is not corrected: {reason}, and no correction by passes of the whole model came closer to it"]
    if refines_blocks:
        notes.append(f"nothing is refined block by block: {reason}")
    return replace(best, notes=(*notes, *_note("which may see other tokens in the compressed model", list(unfitted))))


def _distance(model: nn.Module, truncation: Truncation, task: Task, batches: Sequence[Batch]) -> float:
    """KL divergence of the truncated model's output from the dense one's, mean over units, in nats; infinite where it
    is no number."""
    student = truncation.apply(frozen_copy(model))
    total = units = 0.0
    for batch in batches:
        wanted, found = (task.unit_logits(task.logits(each, batch), batch) for each in (model, student))
        total += float(divergence(found, wanted)) * len(found)
        units += len(found)
    value = total / max(units, 1)
    return value if isfinite(value) else inf


def _planned(members: Sequence[str], plan: Truncation) -> Truncation:
    """The plan's own factors, where there is nothing to fit to."""
    names = [name for unit in _units(members, plan.shared) for name in unit]
    return Truncation({name: plan.factors[name] for name in names if name in plan.factors}, [])


@dataclass(frozen=True)
class _Fitter:
    """Fits layers to the inputs that they have in the compressed model, at the ranks of a plan."""

    calibrated: Calibrated
    plan: Truncation
    gradient_shrinkage: float

    def by_input(self, names: Sequence[str]) -> list[list[str]]:
        """Layers with one input together, in the order given."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self.calibrated.statistics.groups[name], []).append(name)
        return list(groups.values())

    def fitted(self, members: Sequence[str], moments: _Moments) -> Truncation:
        """Layers with one input, each (or each group with one ``down``) fitted to it at the plan's rank."""
        layers = self.calibrated.layers
        planned = {result.name: result for result in self.plan.layers}
        part = Truncation({}, [])
        for unit in _units(members, self.plan.shared):
            regressions = [_regress(name, layers[name], moments) for name in unit]
            rank = planned[unit[0]].rank
            if rank is None:
                part.refits[unit[0]] = _refit(layers[unit[0]], regressions[0])
                continue
            gs = [self._gradient_metric(name) if planned[unit[0]].metric == "fisher" else None for name in unit]
            pairs = _factors(unit, layers, regressions, gs, rank)
            for name, regression, g, pair in zip(unit, regressions, gs, pairs, strict=True):
                part.factors[name] = pair
                delta = regression.weight - pair.up.double() @ pair.down.double()
                value = objective_value(delta, regression.second_moment, g)
                part.layers.append(replace(planned[name], objective=value))
        return part

    def _gradient_metric(self, name: str) -> Tensor | None:
        layer = self.calibrated.layers[name]
        return gradient_metric(name, layer, self.calibrated.statistics, self.gradient_shrinkage)


def _gather(
    looks: Iterable[tuple[list[Seen], list[Seen], Tensor | None, int]], members: Sequence[str]
) -> _Moments | None:
    """Moments of the members' common input in both models, over all times that they run; None where the two may see
    different tokens, or run a different number of times."""
    sums: _Moments | None = None
    leader = members[0]
    for dense_runs, student_runs, mask, positions in looks:
        if not dense_runs or len(dense_runs) != len(student_runs):
            return None
        for dense, student in zip(dense_runs, student_runs, strict=True):
            if not _same_tokens(dense, student, leader, mask, positions):
                return None
            x, own = dense.inputs[leader], student.inputs[leader]
            valid = dense.valid(mask)
            rows, own_rows = valid_rows(x, valid), valid_rows(own, valid)
            sums = sums or _Moments.zero(x.shape[-1], x.device)
            sums.outer += own_rows.T @ own_rows
            sums.cross += rows.T @ own_rows
            sums.dense += rows.sum(0)
            sums.student += own_rows.sum(0)
            sums.tokens += rows.shape[0]
            for name in members:
                if len(dense_runs) == 1 and name in dense.residuals and name in student.residuals:
                    lost = valid_rows(dense.residuals[name].float() - student.residuals[name].float(), valid)
                    sums.add_drift(name, lost.T @ own_rows, lost.sum(0))
    return sums if sums is not None and sums.tokens else None


def _same_tokens(dense: Seen, student: Seen, leader: str, mask: Tensor | None, positions: int) -> bool:
    """Whether the rows of both inputs are the same tokens. An expert sees those that were sent to it, which need not be
    the same ones in the two models."""
    if leader not in dense.inputs or leader not in student.inputs:
        return False
    x, own = dense.inputs[leader], student.inputs[leader]
    if x.shape != own.shape:
        return False
    if dense.numbers is not None and student.numbers is not None:
        return torch.equal(dense.numbers, student.numbers)
    if mask is None and x.dim() > 2:
        return True  # in their order; merging and pooling give fewer, and an expert is given a list
    # What was not made from tokens (a table of relative positions) is the same in both.
    return not dense.of_tokens or not positions or x[..., 0].numel() == positions


def _regress(name: str, layer: DenseLinear, sums: _Moments) -> _Regression:
    """W* of one layer: what it would best be, were it still dense."""
    w, count = dense_weight(layer).double(), sums.tokens
    c, k = sums.outer / count, sums.cross / count
    x, own = sums.dense / count, sums.student / count
    target, output_mean = w @ k, w @ x
    if name in sums.drift:
        target = target + sums.drift_cross[name] / count
        output_mean = output_mean + sums.drift[name] / count
    if layer.bias is not None:
        c = centred(c, own)
        # Of a constant input the bias takes all.
        target = (target - torch.outer(output_mean, own)) * (c.diagonal() > 0)
    ridge = RIDGE * scale_of(c)
    regular = damped(c, RIDGE)
    fitted = torch.linalg.solve(regular, target + ridge * w, left=False)
    return _Regression(fitted, input_metric(c), output_mean, None if layer.bias is None else own)


def _refit(layer: DenseLinear, regression: _Regression) -> Refit:
    return Refit(regression.weight.to(layer.weight.dtype), regression.bias(layer.bias, regression.weight))


def _factors(
    unit: Group,
    layers: Mapping[str, DenseLinear],
    fits: Sequence[_Regression],
    gradients: Sequence[Tensor | None],
    rank: int,
) -> list[Factors]:
    """The factors of W* at this rank; of several layers with one ``down``, together."""
    if len(unit) == 1:
        up, down = decompose(fits[0].weight, fits[0].second_moment, gradients[0], rank).truncated(rank)
        ups: Sequence[Tensor] = (up,)
    else:
        weights, known = [fit.weight for fit in fits], [g for g in gradients if g is not None]
        ups, down = decompose_jointly(weights, fits[0].second_moment, known or None, rank).truncated(rank)
    triples = zip(unit, fits, ups, strict=True)
    biases = [fit.bias(layers[name].bias, up, down) for name, fit, up in triples]
    return stored_factors(ups, down, biases, layers[unit[0]].weight.dtype)


def _units(members: Sequence[str], shared: Sequence[Group]) -> list[Group]:
    """The members one by one, but those that share a ``down`` together."""
    group_of = {name: group for group in shared for name in group}
    return list(dict.fromkeys(group_of.get(name, (name,)) for name in members))
