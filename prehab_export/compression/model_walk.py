"""Runs two models side by side from end to end, if their blocks cannot be run one by one."""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from prehab_export.compression.blocks import LayerRun
from prehab_export.compression.recording import observe_layers, temporary_hooks
from prehab_export.compression.token_rows import token_rows
from prehab_export.inputs import Batch, Task, device_of, moved


class ModelWalk:
    """Runs both models from end to end on every batch of the sample.

    This serves models whose blocks are not a chain, or run more than once. Every observation costs whole forward passes
    of both models.
    """

    def __init__(self, dense: nn.Module, task: Task, batches: Iterable[Batch], layers: Sequence[str]) -> None:
        self.dense, self.task = dense, task
        device = device_of(dense)
        self.batches = [moved(batch, device) for batch in batches]
        runs: list[str] = []
        with temporary_hooks() as hooks:
            for name in layers:
                layer = dense.get_submodule(name)
                hooks.append(layer.register_forward_pre_hook(lambda _layer, _args, name=name: runs.append(name)))
            task.logits(dense, {key: value[:1] for key, value in self.batches[0].items()})
        #: The layers in the order in which they first run.
        self.order = list(dict.fromkeys(runs))
        #: Whether one of them runs more than once.
        self.repeats = len(runs) > len(self.order)

    def observe(
        self, student: nn.Module, names: Sequence[str]
    ) -> Iterator[tuple[list[LayerRun], list[LayerRun], Tensor | None, int]]:
        """Observe the layers as in `BlockWalk.observe`; the number of positions is 0 if it is unknown."""
        for batch in self.batches:
            mask = self.task.token_mask(batch)
            sides = [self._runs(model, batch, mask, names) for model in (self.dense, student)]
            yield sides[0], sides[1], mask, 0 if mask is None else mask.numel()

    def _runs(self, model: nn.Module, batch: Batch, mask: Tensor | None, names: Sequence[str]) -> list[LayerRun]:
        layers = {name: model.get_submodule(name) for name in names}
        rows = token_rows(batch, mask)
        with self.task.running(model):
            return observe_layers([layers], rows, lambda: self.task.logits(model, batch))[0]
