"""Two models side by side from end to end, for models whose blocks cannot be run one by one."""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from prehab_export.compression.blocks import Seen
from prehab_export.compression.recording import removed_afterwards, watched
from prehab_export.compression.token_rows import token_rows
from prehab_export.inputs import Batch, Task, device_of, moved


class ModelWalk:
    """Both models from end to end, for every batch of the sample: for models whose blocks are no chain, or are run more
    than once. Every look costs whole forward passes."""

    def __init__(self, dense: nn.Module, task: Task, batches: Iterable[Batch], layers: Sequence[str]) -> None:
        self.dense, self.task = dense, task
        device = device_of(dense)
        self.batches = [moved(batch, device) for batch in batches]
        runs: list[str] = []
        with removed_afterwards() as hooks:
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
    ) -> Iterator[tuple[list[Seen], list[Seen], Tensor | None, int]]:
        """As `BlockWalk.observe`; positions are 0 where they are not known."""
        for batch in self.batches:
            mask = self.task.token_mask(batch)
            sides = [self._look(model, batch, mask, names) for model in (self.dense, student)]
            yield sides[0], sides[1], mask, 0 if mask is None else mask.numel()

    def _look(self, model: nn.Module, batch: Batch, mask: Tensor | None, names: Sequence[str]) -> list[Seen]:
        layers = {name: model.get_submodule(name) for name in names}
        rows = token_rows(batch, mask)
        with self.task.running(model):
            return watched(layers, rows, False, lambda: self.task.logits(model, batch))
