"""What is asked of a fit."""

from dataclasses import dataclass, field

from converters.errors import InputError
from prehab_export.config import Budget, Target


@dataclass(frozen=True)
class FitRequest:
    """target: where to measure. threads: the numbers of threads that may be used there."""

    budget: Budget
    target: Target = field(default_factory=lambda: Target("local"))
    threads: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if not self.threads or min(self.threads) < 1:
            raise InputError(f"--threads must be 1 or more, not {' '.join(map(str, self.threads)) or 'nothing'}")
