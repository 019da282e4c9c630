"""Truncates layers with regard to the drift of their inputs, which the compressed layers before them cause.

A layer behind compressed layers gets the input x' of the student (the compressed model), not the dense model's input x.
Therefore each layer, block by block and input by input, is fitted to reproduce from x' what the dense model computes
from x. With moments centred if a bias can absorb the mean:

    minimise E‖G^½ (y − Ŵ x')‖²,   y = W x (+ h − h' for a layer that writes to a residual stream h)
    W* = (E[y x'ᵀ] + εW) (C' + εI)⁻¹,   C' = E[x' x'ᵀ]
    Ŵ  = the best rank-r factors of W* in the metric (C', G)

Without h and with G = I, this is the anchored solution of AA-SVD (arXiv 2604.02119) and SAES-SVD. Two things are added.
First, the gradient moment G weights the outputs, as in plain truncation. Second, a layer that writes to a residual
stream compensates for the error of the stream so far: its target is shifted by the stream's drift h − h', so that every
block corrects errors instead of passing them on to the end. The ridge ε pulls W* towards W, not towards zero, in
directions that the sample hardly covers.

Ranks and objectives come from the truncation of the dense model (``truncation.truncate``), the *plan*. So do the
factors of layers that cannot be fitted in this way: layers outside the blocks, and layers that see other tokens in the
two models (experts). The notes of the result name them and give the reason.

If the same block runs many times (ALBERT), a layer's input depends on its own factors, and there is no order in which
every layer comes after all layers that it depends on. In this case, and if the blocks are not a chain, the whole models
are run instead of single blocks, and a layer is fitted to the inputs of all its runs together:

    minimise Σ_k E‖G^½ (y_k − Ŵ x'_k)‖²,   x'_k the input of run k in a student that has factors everywhere

This is the same regression, with E[x' x'ᵀ], E[y x'ᵀ] and the means taken over all runs. A layer that runs many times
does not compensate for the drift of the stream, because it would do so once in every run, which is too much. The
student starts with the plan's factors. Layers are fitted one input after the other, in the order in which they first
run, each to a student with the latest factors of all others, in ``SWEEPS`` rounds. A step may also make the model
worse. Therefore the model's output is compared with the dense model's on the sample (KL divergence per unit) after
every step, and the best of all steps and of the plan itself is kept.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from math import inf, isfinite

import torch
from torch import Tensor, nn

from converters.lowrank import DenseLinear, Factors, dense_weight, exchange_factors, factorize, factors_of
from converters.roots import damped, scale_of
from prehab_export.compression.activations import frozen
from prehab_export.compression.block_walk import BlockWalk
from prehab_export.compression.blocks import Block, LayerRun, NotAChain
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.chain import Chain
from prehab_export.compression.checkpoints import Checkpoints
from prehab_export.compression.factor_files import FactorFiles, FittedBlock
from prehab_export.compression.metric import gradient_metric, input_metric
from prehab_export.compression.model_walk import ModelWalk
from prehab_export.compression.moments import centred
from prehab_export.compression.spool import Folders, spool_in
from prehab_export.compression.training import divergence, sharing_copy
from prehab_export.compression.truncation import LayerResult, Refit, Truncation, computed_dtype, stored_factors
from prehab_export.inputs import Batch, Task, device_of, micro_batches, moved
from prehab_export.linalg import Group, decompose, decompose_jointly, gram, objective_value, valid_rows
from prehab_export.system import Advance, Progress, Team, alone, silent, team

# ε as a share of the mean diagonal of C'.
RIDGE = 1e-2
# Number of rounds over the layers of a model that is run as a whole, and the largest number of inputs for which this is
# done: each input costs a forward pass of both models over the whole sample.
SWEEPS = 2
MOST_INPUTS = 24


@dataclass
class _Moments:
    """Sums over tokens for the layers that read one input, float64; x is the dense model's input, x' the student's.

    cross and dense are only summed if a layer needs them, and a layer that writes to a residual stream does not: its
    target y + h − h' is summed itself, which is m×n instead of n×n, with y the layer's output, bias included.
    """

    outer: Tensor  # n×n: x' x'ᵀ
    student: Tensor  # n: x'
    cross: Tensor | None = None  # n×n: x x'ᵀ
    dense: Tensor | None = None  # n: x
    targets: dict[str, Tensor] = field(default_factory=dict)  # m×n per layer: (y + h − h') x'ᵀ
    totals: dict[str, Tensor] = field(default_factory=dict)  # m per layer: y + h − h'
    tokens: int = 0

    @classmethod
    def zero(cls, width: int, device: torch.device) -> "_Moments":
        square, flat = (torch.zeros(*shape, dtype=torch.float64, device=device) for shape in ((width, width), (width,)))
        return cls(square, flat)

    def add(self, student: Tensor) -> None:
        """Add rows of x' (t×n)."""
        self.outer += gram(student)
        self.student += student.sum(0)
        self.tokens += student.shape[0]

    def pooled(self, team: Team) -> "_Moments":
        """Return the sums over the tokens of all processes of a team."""
        return _Moments(
            team.total(self.outer),
            team.total(self.student),
            None if self.cross is None else team.total(self.cross),
            None if self.dense is None else team.total(self.dense),
            {name: team.total(target) for name, target in self.targets.items()},
            {name: team.total(total) for name, total in self.totals.items()},
            int(team.totals([self.tokens])[0]),
        )

    def add_dense(self, dense: Tensor, student: Tensor) -> None:
        """Add rows of x (t×n) that belong to rows of x'."""
        cross, total = dense.T @ student, dense.sum(0)
        if self.cross is None or self.dense is None:
            self.cross, self.dense = cross.double(), total.double()
        else:
            self.cross += cross
            self.dense += total

    def add_target(self, name: str, target: Tensor, student: Tensor) -> None:
        """Add rows of a layer's target (t×m) that belong to rows of x'."""
        product, total = target.T @ student, target.sum(0)
        if name in self.targets:
            self.targets[name] += product
            self.totals[name] += total
        else:
            self.targets[name], self.totals[name] = product.double(), total.double()


@dataclass(frozen=True)
class _Regression:
    """The regression of one layer on x': W* (m×n), its metric (n×n), and the means from which the bias follows."""

    weight: Tensor
    second_moment: Tensor
    output_mean: Tensor  # m: mean of y − bias
    input_mean: Tensor | None  # n: mean of x'; None if no bias can absorb it

    def bias(self, old: Tensor | None, *matrices: Tensor) -> Tensor | None:
        """Return the bias that belongs to the product of these matrices as the weight."""
        if old is None or self.input_mean is None:
            return None
        product_mean = reduce(lambda x, matrix: matrix @ x, reversed(matrices), self.input_mean)
        return (old.double() + self.output_mean - product_mean).to(torch.promote_types(old.dtype, torch.float32))


@torch.no_grad()
def truncate_along(
    calibrated: Calibrated,
    batches: Iterable[Batch],
    plan: Truncation,
    *,
    gradient_shrinkage: float,
    after_block: Callable[[BlockWalk, Block], None] | None = None,
    folders: Folders | None = None,
    progress: Progress = silent,
) -> Truncation:
    """Repeat the truncation ``plan``, with each layer fitted to the inputs that the compressed model gives it.

    Args:
        calibrated: the dense model, which does not change, and its moments.
        batches: the calibration sample. Processes that work together take a share of it each, and all return the same.
        plan: ranks and objectives of every layer.
        gradient_shrinkage: as in ``TruncateConfig``.
        after_block: called when a block of the student has its factors, before the walk continues. It sees one
            process's share of the sample, so it cannot be used by several.
        folders: where to put states that do not fit in memory, how much fits, and where to put the factors of each
            block when it is done.

    Returns:
        The truncation; its notes say which layers keep the plan's factors, and why.

    Raises:
        NotAChain: the model's blocks cannot be run one by one, and there are too many layers for whole passes.
    """
    folders = folders or Folders()
    sample = list(micro_batches(batches, folders.limits.positions))
    fitter = _Fitter(calibrated, plan, gradient_shrinkage)
    with frozen(calibrated.model), progress("truncate", len(calibrated.layers)) as advance:
        try:
            return _fit_blocks(fitter, sample, after_block, folders, advance)
        except NotAChain as reason:
            with alone():  # every process does the same
                return _fit_by_whole_passes(fitter, sample, reason, after_block is not None, advance)


def _fit_blocks(
    fitter: "_Fitter",
    batches: Sequence[Batch],
    after_block: Callable[[BlockWalk, Block], None] | None,
    folders: Folders,
    advance: Advance,
) -> Truncation:
    """Fit layers one block at a time.

    Raises:
        NotAChain: the model's blocks cannot be run one by one.
    """
    model, plan, layers = fitter.calibrated.model, fitter.plan, fitter.calibrated.layers
    chain = Chain.of(model, fitter.calibrated.task, moved(batches[0], device_of(model)), layers)
    in_blocks = {name for block in chain.blocks for name in block.layers}
    student = sharing_copy(model)
    factorize(student, {name: plan.factors[name] for name in plan.factors if name not in in_blocks})
    walk = BlockWalk(chain, student, batches, spool_in(folders))
    files = None if folders.save_to is None else FactorFiles(folders.save_to, device_of(model))
    # If a block is called with what another has computed, that would have to be saved too.
    checkpoints = None if files is None or chain.stubs is None else Checkpoints(files.folder, walk.batches)
    fitted: list[FittedBlock] = []
    if files is not None and checkpoints is not None and checkpoints.found is not None:
        fitted = [files.read(number) for number in range(checkpoints.found.parts)]
        walk.restore(checkpoints.found.tensors)
    for part in fitted:
        Truncation(part.factors, [], dict(part.refits)).apply(student, copy=False)
        advance(len(part.factors) + len(part.refits))
    done = {name for part in fitted for name in (*part.factors, *part.refits)}
    for number, block in list(enumerate(chain.blocks))[len(fitted) :]:
        part = _fit_block(fitter, walk, block, done, advance)
        if after_block is not None:
            after_block(walk, block)
        walk.advance(block, changed=after_block is not None)
        if files is not None:
            part = replace(part, factors=factors_of(student, part.factors))
            part = files.write(number, part)
            exchange_factors(student, part.factors)
            if checkpoints is not None:
                checkpoints.save(number + 1, walk.saved)
        fitted.append(part)
    results = {result.name: result for part in fitted for result in part.results}
    notes = [
        *_note("which may see other tokens in the compressed model", [n for part in fitted for n in part.unfitted]),
        *_note("outside the repeated blocks", [name for name in layers if name not in in_blocks]),
    ]
    return Truncation(
        factors_of(student),
        [results.get(result.name, result) for result in plan.layers],
        {name: refit for part in fitted for name, refit in part.refits.items()},
        plan.shared,
        tuple(notes),
    )


def _fit_block(fitter: "_Fitter", walk: BlockWalk, block: Block, done: set[str], advance: Advance) -> FittedBlock:
    """Fit the layers of a block that are not done yet, put their weights into the student, and add them to ``done``."""
    plan, factors, refits = fitter.plan, dict[str, Factors](), dict[str, Refit]()
    results: list[LayerResult] = []
    unfitted: list[str] = []
    groups = fitter.by_input(walk.order[block.name])
    walk.run_dense(block, groups)
    for group in groups:
        # Layers that read one input may be in several blocks; if they share a ``down``, the first block fits all.
        members = [name for name in group if name not in done]
        if not members:
            continue
        done |= {name for unit in _units(members, plan.shared) for name in unit}
        moments = _gather(walk.observe(block, group), members)
        if moments is None:
            part = _planned(members, plan)
            unfitted += members
        else:
            part = fitter.fit(members, moments)
        part.apply(walk.student)
        factors |= part.factors
        refits |= part.refits
        results += part.layers
        walk.finish(block, done)
        advance(len(members))
    return FittedBlock(factors, refits, results, unfitted)


def _note(reason: str, names: Sequence[str]) -> list[str]:
    """Return a note that these layers are not corrected; no note if there are none."""
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"drift is not corrected for {names[0]}{more}, {reason}"]


def _fit_by_whole_passes(
    fitter: "_Fitter", batches: Sequence[Batch], reason: NotAChain, refines_blocks: bool, advance: Advance
) -> Truncation:
    """Fit layers with passes of the whole models, because of the given reason.

    Raises:
        NotAChain: there are too many layers for whole passes.
    """
    model, task, plan = fitter.calibrated.model, fitter.calibrated.task, fitter.plan
    walk = ModelWalk(model, task, batches, list(fitter.calibrated.layers))
    inputs = fitter.by_input(walk.order)
    if len(inputs) == 1 and not walk.repeats:
        return plan  # no layer depends on another
    if len(inputs) > MOST_INPUTS:
        raise NotAChain(f"{reason}, and {len(inputs)} inputs of layers would take as many passes of the whole model")
    best = current = plan = replace(plan, factors=dict(plan.factors))
    best_distance = _distance(model, plan, task, walk.batches)
    unfitted: dict[str, None] = {}
    for sweep in range(SWEEPS):
        for members in inputs:
            moments = _gather(walk.observe(current.apply(sharing_copy(model)), members), members)
            if moments is None:
                unfitted |= dict.fromkeys(members)
            else:
                part = fitter.fit(members, moments)
                results = {result.name: result for result in (*current.layers, *part.layers)}
                current = replace(
                    current,
                    factors={**current.factors, **part.factors},
                    refits=current.refits | part.refits,
                    layers=list(results.values()),
                )
                if (distance := _distance(model, current, task, walk.batches)) < best_distance:
                    best, best_distance = current, distance
            if sweep == 0:
                advance(len(members))
    notes = [f"drift is corrected by passes of the whole model: {reason}"]
    if best is plan:
        notes = [
            f"drift is not corrected: {reason}, and passes of the whole model did not bring its output closer to the "
            "dense model's"
        ]
    if refines_blocks:
        notes.append(f"blocks are not refined one by one: {reason}")
    return replace(best, notes=(*notes, *_note("which may see other tokens in the compressed model", list(unfitted))))


def _distance(model: nn.Module, truncation: Truncation, task: Task, batches: Sequence[Batch]) -> float:
    """Return the KL divergence of the truncated model's output from the dense model's, averaged over units, in nats.

    The result is infinite if the divergence is NaN or Inf.
    """
    student = truncation.apply(sharing_copy(model))
    total = units = 0.0
    for batch in batches:
        expected, actual = (task.unit_logits(task.logits(network, batch), batch) for network in (model, student))
        total += float(divergence(actual, expected)) * len(actual)
        units += len(actual)
    value = total / max(units, 1)
    return value if isfinite(value) else inf


def _planned(members: Sequence[str], plan: Truncation) -> Truncation:
    """Return the plan's factors for these layers, which cannot be fitted."""
    names = [name for unit in _units(members, plan.shared) for name in unit]
    return Truncation({name: plan.factors[name] for name in names if name in plan.factors}, [])


@dataclass(frozen=True)
class _Fitter:
    """Fits layers to their inputs in the compressed model, at the ranks of a plan."""

    calibrated: Calibrated
    plan: Truncation
    gradient_shrinkage: float

    def by_input(self, names: Sequence[str]) -> list[list[str]]:
        """Group these layers by input, keeping their order."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self.calibrated.statistics.groups[name], []).append(name)
        return list(groups.values())

    def fit(self, members: Sequence[str], moments: _Moments) -> Truncation:
        """Fit layers that read one input, each (or each group with one ``down``) at the plan's rank."""
        layers = self.calibrated.layers
        planned = {result.name: result for result in self.plan.layers}
        factors: dict[str, Factors] = {}
        refits: dict[str, Refit] = {}
        results: list[LayerResult] = []
        inputs = {
            folds: _Input.of(moments, folds_mean=folds) for folds in {layers[name].bias is not None for name in members}
        }
        for unit in _units(members, self.plan.shared):
            regressions = [_regress(n, layers[n], moments, inputs[layers[n].bias is not None]) for n in unit]
            rank = planned[unit[0]].rank
            if rank is None:
                refits[unit[0]] = _refit(layers[unit[0]], regressions[0])
                continue
            gs = [self._gradient_metric(name) if planned[unit[0]].metric == "fisher" else None for name in unit]
            pairs, values = _factors(unit, layers, regressions, gs, rank)
            for name, pair, value in zip(unit, pairs, values, strict=True):
                factors[name] = pair
                results.append(replace(planned[name], objective=value))
        return Truncation(factors, results, refits)

    def _gradient_metric(self, name: str) -> Tensor | None:
        layer = self.calibrated.layer(name)
        return gradient_metric(name, layer, self.calibrated.statistics, self.gradient_shrinkage)


def _gather(
    observations: Iterable[tuple[list[LayerRun], list[LayerRun], Tensor | None, int]], members: Sequence[str]
) -> _Moments | None:
    """Gather moments of the members' common input in both models, over all of their runs.

    Returns:
        The moments, over the shares of all processes that work together; None if the two models may see different
        tokens, or run the members a different number of times.
    """
    sums = _gather_share(observations, members)
    if not all(team().from_each(sums is not None)):
        return None
    assert sums is not None
    return sums if team().size == 1 else sums.pooled(team())


def _gather_share(
    observations: Iterable[tuple[list[LayerRun], list[LayerRun], Tensor | None, int]], members: Sequence[str]
) -> _Moments | None:
    """Gather moments as `_gather` does, over the observations of this process."""
    sums: _Moments | None = None
    for dense_runs, student_runs, mask, positions in observations:
        if not dense_runs or len(dense_runs) != len(student_runs):
            return None
        for dense, student in zip(dense_runs, student_runs, strict=True):
            if not _same_tokens(dense, student, mask, positions):
                return None
            assert student.input is not None
            valid = dense.valid(mask)
            rows = valid_rows(student.input, valid)
            sums = sums or _Moments.zero(rows.shape[-1], rows.device)
            sums.add(rows)
            writers = [name for name in members if name in dense.outputs] if len(dense_runs) == 1 else []
            if not student.residuals.keys() >= set(writers):
                return None
            for name in writers:
                drift = dense.residuals[name].float() - student.residuals[name].float()
                sums.add_target(name, valid_rows(dense.outputs[name].float() + drift, valid), rows)
            if len(writers) < len(members):
                assert dense.input is not None
                sums.add_dense(valid_rows(dense.input, valid), rows)
    return sums if sums is not None and sums.tokens else None


def _same_tokens(dense: LayerRun, student: LayerRun, mask: Tensor | None, positions: int) -> bool:
    """Return whether the rows of both inputs are the same tokens.

    An expert sees only the tokens routed to it, which may differ between the two models.
    """
    if dense.shape != student.shape:
        return False
    if dense.numbers is not None and student.numbers is not None:
        return torch.equal(dense.numbers, student.numbers)
    if mask is None and len(dense.shape) > 2:
        return True  # rows are in order: merging and pooling give fewer rows, and an expert gets a flat list
    # An input not computed from tokens (a table of relative positions) is the same in both models.
    return not dense.from_tokens or not positions or dense.shape[:-1].numel() == positions


@dataclass(frozen=True)
class _Input:
    """What the regressions of all layers with one input x' share, if they have a bias, or if they have none.

    moment: C' (n×n), centred if a bias can absorb the mean.
    metric: C' damped for truncation.
    mean: E[x'] (n).
    lu: LU decomposition of C' + εI, and its pivots. Rounding may make C' indefinite if x' hardly varies.
    """

    moment: Tensor
    metric: Tensor
    mean: Tensor
    lu: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, sums: _Moments, *, folds_mean: bool) -> "_Input":
        moment, mean = sums.outer / sums.tokens, sums.student / sums.tokens
        moment = centred(moment, mean) if folds_mean else moment
        return cls(moment, input_metric(moment), mean, torch.linalg.lu_factor(damped(moment, RIDGE)))


def _regress(name: str, layer: DenseLinear, sums: _Moments, student: _Input) -> _Regression:
    """Return the regression of one layer; its W* is the best weight that the layer could have if it stayed dense."""
    w, count = dense_weight(layer).double(), sums.tokens
    if name in sums.targets:
        target, output_mean = sums.targets[name] / count, sums.totals[name] / count
        if layer.bias is not None:  # the targets are outputs, which include it
            target = target - torch.outer(layer.bias.double(), student.mean)
            output_mean = output_mean - layer.bias.double()
    else:
        assert sums.cross is not None
        assert sums.dense is not None
        target, output_mean = w @ (sums.cross / count), w @ (sums.dense / count)
    if layer.bias is not None:
        # The bias absorbs constant inputs entirely.
        target = (target - torch.outer(output_mean, student.mean)) * (student.moment.diagonal() > 0)
    target = target + RIDGE * scale_of(student.moment) * w
    weight = torch.linalg.lu_solve(*student.lu, target, left=False)
    return _Regression(weight, student.metric, output_mean, None if layer.bias is None else student.mean)


def _refit(layer: DenseLinear, regression: _Regression) -> Refit:
    return Refit(regression.weight.to(computed_dtype(layer)), regression.bias(layer.bias, regression.weight))


def _factors(
    unit: Group,
    layers: Mapping[str, DenseLinear],
    regressions: Sequence[_Regression],
    gradients: Sequence[Tensor | None],
    rank: int,
) -> tuple[list[Factors], list[float]]:
    """Return the factors of W* at this rank, and the objective's value for each layer; several layers with one ``down``
    are factored together."""
    if len(unit) == 1:
        single = decompose(regressions[0].weight, regressions[0].second_moment, gradients[0], rank)
        up, down = single.truncated(rank)
        ups: Sequence[Tensor] = (up,)
        values = [single.objective(rank)]
    else:
        weights = [regression.weight for regression in regressions]
        known = [g for g in gradients if g is not None]
        ups, down = decompose_jointly(weights, regressions[0].second_moment, known or None, rank).truncated(rank)
        values = [
            objective_value(weight - up @ down, regression.second_moment, g)
            for weight, up, regression, g in zip(weights, ups, regressions, gradients, strict=True)
        ]
    triples = zip(unit, regressions, ups, strict=True)
    biases = [regression.bias(layers[name].bias, up, down) for name, regression, up in triples]
    return stored_factors(ups, down, biases, computed_dtype(layers[unit[0]])), values


def _units(members: Sequence[str], shared: Sequence[Group]) -> list[Group]:
    """Return the members as units: groups that share a ``down`` together, all others alone."""
    group_of = {name: group for group in shared for name in group}
    return list(dict.fromkeys(group_of.get(name, (name,)) for name in members))
