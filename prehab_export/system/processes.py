"""Several processes that share out the work of one run. ``accelerate launch`` starts them; accelerate connects them.

One process, which is the usual case, is a team of its own: nothing is imported, connected or copied for it. Work is
shared out only inside `together`, which all processes enter for the same piece of work. Everywhere else each process is
on its own, so that code which runs in one process alone never waits for the others.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from converters.errors import InputError
from prehab_export.system.errors import ProcessError

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

# While the first process does work that is not shared out, the others wait. A process that ends is noticed at once.
PATIENCE = timedelta(days=30)
# Words in the messages of gloo and NCCL about a connection that is lost.
_LOST = ("connection", "peer", "socket", "timed out", "timeout", "nccl", "abort")


@dataclass(frozen=True)
class Team:
    """The processes that do one piece of work together.

    rank: the number of this process, from 0.
    size: the number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which alone writes files and speaks to the user."""
        return self.rank == 0

    def share_of(self, count: int) -> range:
        """Return the numbers of the items, out of ``count``, that are this process's share.

        >>> list(Team(1, 3).share_of(8))
        [1, 4, 7]
        """
        return range(self.rank, count, self.size)

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Return a process for each item, so that all have about the same to do (largest first, to the least loaded).

        >>> Team(0, 2).owners([1.0, 4.0, 2.0, 2.0])
        [0, 0, 1, 1]
        """
        loads, result = [0.0] * self.size, [0] * len(costs)
        for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
            result[item] = min(range(self.size), key=lambda rank: loads[rank])
            loads[result[item]] += costs[item]
        return result

    def total(self, values: "Tensor") -> "Tensor":
        """Return the sum of a tensor over all processes, the same bits in each of them."""
        if self.size == 1:
            return values
        from accelerate.utils import reduce

        return _connected(lambda: reduce(values.contiguous(), reduction="sum"))

    def totals(self, values: Sequence[float]) -> list[float]:
        """Return the sums of these numbers over all processes, added in float64."""
        if self.size == 1:
            return list(values)
        import torch

        return self.total(torch.tensor(values, dtype=torch.float64)).tolist()

    def from_first(self, value: Value) -> Value:
        """Return the first process's value in every process. Tensors in it must be on the CPU."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return _connected(lambda: broadcast_object_list([value], from_process=0))[0]

    def from_each(self, value: Value) -> list[Value]:
        """Return the values of all processes, in order. Tensors in them must be on the CPU."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return _connected(lambda: gather_object([value]))

    def exchange(self, values: "Sequence[Tensor]") -> None:
        """Give all of these tensors to every process, in place. Each process has computed those of its `share_of`."""
        if self.size > 1:
            from accelerate.utils import broadcast

            for number, tensor in enumerate(values):
                _connected(partial(broadcast, tensor, from_process=number % self.size))

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.from_each(None)


_everyone = _current = Team()
_in_step = True


def launched_processes() -> int:
    """Return the number of processes that the launcher of this one has started for the same command."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def local_rank() -> int:
    """Return the number of this process among those of its team on the same machine, which is that of its device."""
    return int(os.environ.get("LOCAL_RANK", 0)) if _everyone.size > 1 else 0


def join_processes() -> Team:
    """Connect to the other launched processes, and return all of them as a team.

    Raises:
        InputError: the launcher was told to train in a way that this program does not.
        ProcessError: another process cannot be reached.
    """
    global _everyone
    if launched_processes() == 1 or _everyone.size > 1:
        return _everyone
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{plugin}"):  # transformers would load an empty model in most processes
            raise InputError(
                f"accelerate is set to use {plugin}, but this program shares out models itself; launch it without, and "
                "with another config file for accelerate if your usual one asks for it"
            )
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    # Objects and everything kept in the host's memory go by gloo, which waits without keeping a GPU busy.
    backend = "gloo" if on_cpu else "cuda:nccl,cpu:gloo"
    state = _connected(lambda: PartialState(cpu=on_cpu, backend=backend, timeout=PATIENCE))
    _everyone = Team(state.process_index, state.num_processes)
    return _everyone


def leave_processes() -> None:
    """End the connection to the other processes."""
    global _everyone
    if _everyone.size > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
        _everyone = Team()


def everyone() -> Team:
    """Return all processes that were launched and joined, whether or not they work together now."""
    return _everyone


def team() -> Team:
    """Return the processes that share out the work at hand: this one alone, except inside `together`."""
    return _current


@contextmanager
def together() -> Iterator[Team]:
    """Share out the work inside this context over all processes, which must all enter it.

    Raises:
        ProcessError: another process has ended.
    """
    global _current, _in_step
    _current, _in_step = _everyone, False
    try:
        with _named_losses():
            yield _current
        _in_step = True
    finally:
        _current = Team()


@contextmanager
def alone() -> Iterator[None]:
    """Leave the work inside this context to this process, even within `together`."""
    global _current
    before, _current = _current, Team()
    try:
        yield
    finally:
        _current = before


def in_step() -> bool:
    """Whether the other processes wait for this one, and not in the midst of work that failed here."""
    return _in_step


def _connected(action: Callable[[], Any]) -> Any:
    """Do what needs the other processes.

    Raises:
        ProcessError: one of them cannot be reached.
    """
    with _named_losses():
        return action()


@contextmanager
def _named_losses() -> Iterator[None]:
    """Turn the errors of gloo and NCCL about a lost connection into a `ProcessError`."""
    try:
        yield
    except ProcessError:
        raise
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in _LOST):
            raise
        raise ProcessError(
            "another process of this run has ended or cannot be reached; its own message says why. "
            "Run the same command again to continue"
        ) from error
