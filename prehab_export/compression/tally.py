"""Running sums of outer products, gathered by hooks while a model runs forward and backward."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from converters.errors import InputError
from prehab_export.compression.activations import RowOrder, by_sample, row_order
from prehab_export.compression.dataflow import TokenRows
from prehab_export.compression.input_groups import RowOrders
from prehab_export.compression.moments import InputMoment, Statistics
from prehab_export.compression.token_rows import token_rows
from prehab_export.inputs import Batch, Task, full_precision, sample_count
from prehab_export.linalg import ClusterSums, PlainSums, Sampling, real
from prehab_export.system import Team

# (logits of the units, batch or a piece of it) → a label for each unit.
Labels = Callable[[Tensor, Batch], Tensor]

Sums = ClusterSums | PlainSums


class Tally:
    """Running sums of outer products, gathered by hooks sample by sample.

    groups: layer → input group.
    orders: the order of each layer's rows in each of its runs in one forward pass.
    sums: creates empty sums for one layer.
    loss_scale: power of two by which the loss is multiplied before its backward pass; gradients are divided by it.

    Args (when created):
        inputs: sum inputs; otherwise only gradients.
    """

    def __init__(
        self,
        groups: Mapping[str, str],
        orders: RowOrders,
        sums: Callable[[], Sums],
        loss_scale: float = 1.0,
        *,
        inputs: bool = True,
    ) -> None:
        self.groups = groups
        self.orders = orders
        self.tracks_rows = any(RowOrder.TRACKED in runs for runs in orders.values())
        self.sums = sums
        self.loss_scale = loss_scale
        self.units = 0
        # Inputs are summed relative to the mean of the first batch: large means cancel before they are squared, and
        # the sampling error is that of the centred moment. All processes of a team need the same shift (`set_shift`).
        self.shift: dict[str, Tensor] = {}
        self.shift_is_set = False
        self.total: dict[str, Tensor] = {}
        # A group whose first layer is elsewhere is gathered there.
        self.inputs = {name: sums() for name, group in groups.items() if inputs and name == group}
        self.gradients: dict[str, Sums] = {}

    def watch(
        self, model: nn.Module, task: Task, batch: Batch, layers: Mapping[str, nn.Module], labels: Labels | None
    ) -> None:
        """Add one batch: run a forward pass and, if ``labels`` is given, a backward pass of the loss."""
        mask = task.token_mask(batch)
        rows = token_rows(batch, mask) if self.tracks_rows and mask is not None else None
        with self.watching(task, batch, layers, labels is not None, rows):
            with rows or nullcontext():
                logits = task.logits(model, batch)
            unit_logits = task.unit_logits(logits, batch)
            if labels is not None:
                targets = labels(unit_logits, batch)
                # The sum, not the mean, so that every unit keeps the gradient of its own loss.
                loss = nn.functional.cross_entropy(unit_logits.float(), targets, reduction="sum")
                (self.loss_scale * loss).backward()
                self.units += len(unit_logits)

    @contextmanager
    def watching(
        self, task: Task, batch: Batch, layers: Mapping[str, nn.Module], gradients: bool, rows: TokenRows | None
    ) -> Iterator[None]:
        """Add what goes through these layers within the context: their inputs and, if requested, output gradients.

        Args:
            rows: tracks the tokens of the batch, if the rows of a layer are not in order.
        """
        mask, samples = task.token_mask(batch), sample_count(batch)
        units = units_by_sample(task, batch) if gradients else None
        handles = []
        for name, layer in layers.items():
            if name in self.inputs:
                handles.append(layer.register_forward_pre_hook(self._input_hook(name, mask, samples, rows)))
            if units is not None:
                handles.append(layer.register_forward_hook(self._output_hook(name, mask, units, rows)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _row_finder(self, name: str, rows: TokenRows | None) -> Callable[[Tensor], tuple[RowOrder, Tensor | None]]:
        """Return a function from the layer's input to the order and the token numbers of its rows.

        It is called once for each run of the layer in one forward pass.
        """
        orders = iter(self.orders[name])

        def find_rows(x: Tensor) -> tuple[RowOrder, Tensor | None]:
            # The number of runs of an expert depends on the batch.
            order = next(orders, RowOrder.UNKNOWN)
            if rows is not None and order in (RowOrder.TRACKED, RowOrder.UNKNOWN):
                order = row_order(x, rows)
            return order, None if rows is None or order is not RowOrder.TRACKED else rows.rows(x)

        return find_rows

    def _input_hook(self, name: str, mask: Tensor | None, samples: int, rows: TokenRows | None) -> Callable:
        find_rows = self._row_finder(name, rows)

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            order, numbers = find_rows(args[0])
            with full_precision(x.device):
                values, valid = by_sample(x, mask, samples, order, numbers)
                if not bool(valid.any()):
                    return
                if name not in self.shift:
                    mean = real(values, valid).mean(0)
                    self.shift[name] = torch.zeros_like(mean) if self.shift_is_set else mean
                self.shift[name] = self.shift[name].to(values.device)
                values = values - self.shift[name]
                total = real(values, valid).sum(0, dtype=torch.float64)
                self.total[name] = self.total[name] + total if name in self.total else total
                self.inputs[name].add(values, valid, valid.sum(1))

        return hook

    def _output_hook(self, name: str, mask: Tensor | None, units: Tensor, rows: TokenRows | None) -> Callable:
        find_rows = self._row_finder(name, rows)

        def add_gradient(gradient: Tensor, order: RowOrder, numbers: Tensor | None) -> None:
            with full_precision(gradient.device):
                values, valid = by_sample(gradient, mask, len(units), order, numbers)
                sizes = units if len(values) == len(units) else units.sum()[None]
                values = values if self.loss_scale == 1 else values / self.loss_scale
                if name not in self.gradients:
                    self.gradients[name] = self.sums()
                self.gradients[name].add(values, valid, sizes.to(values.device))

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise InputError(
                    f"the model runs {name} without keeping what gradients need (as reversible layers do), so the "
                    "increase in loss cannot be predicted; use --objective activation --allocation uniform"
                )
            order, numbers = find_rows(args[0])
            return gradient_hook(lambda gradient: add_gradient(gradient, order, numbers))(module, args, output)

        return hook

    def set_shift(self, team: Team, watch_first: Callable[["Tally"], None]) -> None:
        """Sum inputs relative to the same shift in all processes of a team: the mean of the first one's first batch.

        An input that no batch of the first process reaches is summed as it is.

        Args:
            watch_first: lets an empty tally watch the batches of this process until all inputs have a shift.
        """
        if team.size == 1:
            return
        trial = Tally(self.groups, self.orders, PlainSums, self.loss_scale)
        if team.leads:
            watch_first(trial)
        self.shift, self.shift_is_set = team.from_first({name: mean.cpu() for name, mean in trial.shift.items()}), True

    @property
    def has_shift(self) -> bool:
        """Whether every input has been reached."""
        return self.shift.keys() == self.inputs.keys()

    def pool(self, team: Team, device: torch.device) -> None:
        """Replace all sums by their totals over the processes of a team, each of which has added other batches.

        Args:
            device: the device of the model.
        """
        if team.size == 1:
            return
        mine = [{name: sums.outer.shape[0] for name, sums in held.items()} for held in (self.inputs, self.gradients)]
        inputs, gradients = (_largest(widths) for widths in zip(*team.from_each(mine), strict=True))
        for group, sums in self.inputs.items():
            if inputs[group]:
                sums.pool(team.total, inputs[group], device)
                nothing = torch.zeros(inputs[group], dtype=torch.float64, device=device)
                self.shift.setdefault(group, nothing.float())
                self.total[group] = team.total(self.total.get(group, nothing))
        for name in self.groups:
            if name in gradients:
                self.gradients.setdefault(name, self.sums()).pool(team.total, gradients[name], device)
        self.units = int(team.totals([self.units])[0])

    def _input_moment(self, group: str) -> InputMoment:
        sums = self.inputs.pop(group)
        shift, offset = (
            values.to(sums.outer.device, torch.float64) for values in (self.shift[group], self.total[group])
        )
        offset = offset / sums.rows
        sampling, second = sums.sampling(), sums.outer.div_(sums.rows)
        # offset shiftᵀ + shift offsetᵀ + shift shiftᵀ, as two updates in place
        second.addr_(offset + shift, shift).addr_(shift, offset)
        return InputMoment(second.float(), (shift + offset).float(), sums.rows, sampling)

    def _gradient_moment(self, name: str) -> tuple[Tensor, Sampling]:
        sums = self.gradients.pop(name)
        return (sums.outer / self.units).float(), sums.sampling()

    def result(self) -> Statistics:
        """Return the moments of everything added, in float32. The sums, which are larger, are freed one by one.

        Raises:
            InputError: no token reached a layer.
        """
        empty = [group for group, sums in self.inputs.items() if not sums.rows]
        if empty:
            raise InputError(f"no token of this data reaches {empty[0]}; exclude it with --exclude {empty[0]!r}")
        inputs = {group: self._input_moment(group) for group in list(self.inputs)}
        gradients = {name: self._gradient_moment(name) for name in list(self.gradients)}
        return Statistics(
            inputs,
            dict(self.groups),
            {name: moment for name, (moment, _) in gradients.items()},
            self.units,
            {name: sampling for name, (_, sampling) in gradients.items()},
        )


def _largest(widths: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the largest width of each input or output over processes, of which some have not been reached by it."""
    result: dict[str, int] = {}
    for each in widths:
        for name, width in each.items():
            result[name] = max(width, result.get(name, 0))
    return result


def gradient_hook(action: Callable[[Tensor], None]) -> Callable:
    """Return a forward hook that calls ``action`` with the gradient of the module's output."""

    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # All parameters are frozen, so the graph starts at the first selected layers. The clone protects the leaf from
        # models that work in place.
        tracked = output if output.requires_grad else output.requires_grad_().clone()
        tracked.register_hook(action)
        return tracked

    return hook


def units_by_sample(task: Task, batch: Batch) -> Tensor:
    """Return the number of units of loss in each sample (B)."""
    samples = ({key: value[row : row + 1] for key, value in batch.items()} for row in range(sample_count(batch)))
    return torch.tensor([len(task.unit_labels(sample)) for sample in samples])
