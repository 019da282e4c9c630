"""The request that a fit answers."""

from dataclasses import dataclass, field

from converters.errors import InputError
from prehab_export.config import Budget, Target


@dataclass(frozen=True)
class FitRequest:
    """The limits of a fit and the place to measure.

    budget: the limits that the model must keep to.
    target: the place to measure.
    threads: the numbers of threads to try at the target.

    Raises:
        InputError: ``threads`` is empty or holds a number below 1.
    """

    budget: Budget
    target: Target = field(default_factory=lambda: Target("local"))
    threads: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if not self.threads or min(self.threads) < 1:
            raise InputError(f"--threads must be 1 or more, not {' '.join(map(str, self.threads)) or 'nothing'}")
