"""Refits the factors of a compressed model to the grid of a quantisation, with nearly the same products."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from converters.lowrank import low_rank_layers, shared_groups
from prehab_export.compression.metric import layer_metric
from prehab_export.compression.moments import Statistics
from prehab_export.linalg import Grid, Pair, Weighing, fit_to_grid
from prehab_export.system import Progress, silent


@dataclass(frozen=True)
class GridFit:
    """The cost of rounding one layer, or layers with one ``down`` (see ``Weighing.cost``).

    plain: cost if the factors are rounded as they are.
    refitted: cost of the refitted factors.
    """

    layers: tuple[str, ...]
    plain: float
    refitted: float


@torch.no_grad()
def refit_to_grid(
    model: nn.Module,
    statistics: Statistics,
    grid: Grid,
    gradient_shrinkage: float,
    *,
    replaceable: Collection[str],
    progress: Progress = silent,
) -> list[GridFit]:
    """Replace the factors of every two-factor layer, in place, by factors on the grid; a bias absorbs the mean error.

    Args:
        statistics: moments of the model before truncation.
        gradient_shrinkage: as in ``TruncateConfig``.
        replaceable: names of the parameters that may change; a layer with any other parameter is skipped.
    """
    layers = low_rank_layers(model)
    groups = shared_groups(model)
    followers = {name for group in groups for name in group[1:]}
    units = {group[0]: group for group in groups}
    fits = []
    with progress("fit to the grid", len(layers)) as advance:
        for leader in layers:
            if leader in followers:
                continue
            names = units.get(leader, (leader,))
            needed = {f"{name}.up.{part}" for name in names for part, _ in layers[name].up.named_parameters()}
            if needed | {f"{leader}.down.weight"} <= set(replaceable):
                fits.append(_refit(model, names, statistics, grid, gradient_shrinkage))
            advance(len(names))
    return fits


def _refit(
    model: nn.Module, names: tuple[str, ...], statistics: Statistics, grid: Grid, gradient_shrinkage: float
) -> GridFit:
    layers = [low_rank_layers(model)[name] for name in names]
    metrics = [
        layer_metric(name, layer, statistics, gradient_shrinkage) for name, layer in zip(names, layers, strict=True)
    ]
    gradients = tuple(metric.gradient_moment for metric in metrics)
    weighing = Weighing(metrics[0].second_moment, gradients)
    pair = Pair(tuple(layer.up.weight.double() for layer in layers), layers[0].down.weight.double())
    fitted = fit_to_grid(pair, weighing, grid)
    # If the factors are rounded as they are, no bias absorbs the mean error, so the uncentred moment applies.
    raw = Weighing(statistics.input_of(names[0]).second_moment.to(pair.down), gradients)
    fit = GridFit(names, raw.cost(pair, pair.snapped(grid), grid), weighing.cost(pair, fitted, grid))
    for layer, metric, up, old in zip(layers, metrics, fitted.ups, pair.ups, strict=True):
        if layer.bias is not None and metric.mean is not None:
            mean_error = old @ (pair.down @ metric.mean) - up @ (fitted.down @ metric.mean)
            layer.bias.copy_(layer.bias.double() + mean_error)
        layer.up.weight.copy_(up)
    layers[0].down.weight.copy_(fitted.down)
    return fit
