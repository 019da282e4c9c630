"""Refines factors so that the compressed model reproduces the dense model's outputs, without labels.

There are two ways, used one after the other. *Block-wise* refinement happens during the walk of
``drift.truncate_along``: as soon as a block has its factors, they are tuned to give the dense block's output from the
student's own states of the calibration sample (AA-SVD, arXiv 2604.02119). Only one block is differentiated at a time.
*End-to-end* refinement tunes all factors together towards the dense model's output distribution (KL divergence per
unit) and, if requested, its hidden states after every block. It needs neither labels nor moments, so it can use any
number of different samples.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from converters.lowrank import low_rank_layers
from prehab_export.compression.bases import factor_bases
from prehab_export.compression.block_walk import BlockWalk
from prehab_export.compression.blocks import Block, find_blocks
from prehab_export.compression.factored import Factored, factor_parameters
from prehab_export.compression.moments import Statistics
from prehab_export.compression.recording import hidden_of
from prehab_export.compression.training import Row, Trainable, divergence, optimise, train
from prehab_export.config import RefineConfig
from prehab_export.inputs import Batch, Samples
from prehab_export.system import Progress, named, silent, team


def block_refiner(config: RefineConfig, statistics: Statistics, *, seed: int = 0) -> Callable[[BlockWalk, Block], None]:
    """Return the function that ``truncate_along`` calls after each block, to tune it for ``config.block_steps`` steps.

    The loss is the squared error of the block's output, divided by the variance of the dense block's output. The tuned
    factors are kept only if they lower the error over the whole sample.
    """

    def refine_block(walk: BlockWalk, block: Block) -> None:
        module = walk.student.get_submodule(block.name)
        parameters = factor_parameters(module)
        if not parameters or not config.block_steps:
            return
        targets = walk.dense_states

        def error(number: int) -> Tensor:
            return relative_error(walk.output(block, number), targets[number].load(), walk.masks[number])

        def mean_error() -> float:
            with torch.no_grad():
                return float(torch.stack([error(number) for number in range(len(targets))]).mean())

        before, start = mean_error(), [parameter.detach().clone() for parameter in parameters]
        generator = torch.Generator().manual_seed(seed)
        order = [int(torch.randint(len(targets), (1,), generator=generator)) for _ in range(config.block_steps)]
        with torch.enable_grad():
            bases = factor_bases(walk.student, statistics, block.layers)
            trainable = Trainable(module, parameters, bases, walk.task.precision)
            optimise(trainable, config.block_schedule, lambda step: (error(order[step]), {}))
        if not mean_error() < before:
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)

    return refine_block


def refine(
    factored: Factored,
    samples: Samples,
    config: RefineConfig,
    *,
    teacher: nn.Module,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Row]:
    """Tune all factors in place, end to end; return one row of figures per step.

    The loss is (1 − hidden_share)·KL(dense ‖ compressed) per unit, plus hidden_share times the relative error of the
    hidden states, averaged over blocks.

    Args:
        samples: samples to draw inputs from; their labels are not used.
        teacher: the dense model, frozen.
    """
    student, task = factored.model, factored.task
    blocks = [block.name for block in find_blocks(student, low_rank_layers(student))] if config.hidden_share else []
    with _Outputs(student, blocks) as student_outputs, _Outputs(teacher, blocks) as teacher_outputs:

        def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Row]:
            with torch.no_grad():
                target = task.unit_logits(task.logits(teacher, batch), batch)
            value = divergence(task.unit_logits(task.logits(model, batch), batch), target)
            figures = {"divergence": value.item()}
            if blocks:
                mask = task.token_mask(batch)
                errors = [
                    relative_error(student_outputs.latest[name], teacher_outputs.latest[name], mask) for name in blocks
                ]
                hidden = torch.stack(errors).mean()
                figures["hidden_error"] = hidden.item()
                value = (1 - config.hidden_share) * value + config.hidden_share * hidden
            return value, figures

        return train(
            factored.trainable(), samples, config.schedule, loss, seed=seed, progress=named(progress, "refine")
        )


def relative_error(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Return ‖output − target‖² / ‖target − its mean‖² over real tokens, as a scalar tensor.

    Of processes that work together, each gets its share of that over the tokens of all.
    """
    if mask is not None and mask.shape == target.shape[:-1]:
        output, target = output[mask], target[mask]
    output, target = output.float().flatten(0, -2), target.float().flatten(0, -2)
    mean = team().total(target.sum(0)) / team().totals([len(target)])[0]
    return (output - target).square().sum() / team().total((target - mean).square().sum()).clamp_min(1e-12)


class _Outputs:
    """A context that keeps the latest output of the named blocks of a model."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.latest: dict[str, Tensor] = {}
        self.handles = [model.get_submodule(name).register_forward_hook(self._keep(name)) for name in names]

    def __enter__(self) -> "_Outputs":
        return self

    def __exit__(self, *_error: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _keep(self, name: str) -> Callable:
        def hook(_block: nn.Module, _args: Any, output: Any) -> None:
            self.latest[name] = hidden_of(output)

        return hook
