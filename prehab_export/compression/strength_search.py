"""Searches for the λ of prehab that gives the compressed model the lowest loss on samples that training did not see.

The choice of λ is an open question of Prehab (arXiv 2512.01980). Each trial is a short prehab and a truncation. The
search starts from the default and moves in factors of √10, in the direction that lowers the loss, until the loss rises
again or the trials are used up.
"""

from collections.abc import Callable
from math import sqrt

STEP = sqrt(10)


def find_strength(
    trial: Callable[[float], float], start: float, trials: int, step: float = STEP
) -> tuple[float, list[dict[str, float]]]:
    """Return the λ with the lowest loss among at most ``trials`` tried, and one row (strength, loss) for each of them.

    Args:
        trial: λ → loss of the compressed model.
        start: first λ to try.

    >>> from math import log10
    >>> best, rows = find_strength(lambda strength: (log10(strength) - 3) ** 2, start=100.0, trials=6)
    >>> round(best), len(rows)
    (1000, 4)
    """
    losses: dict[int, float] = {}

    def loss(exponent: int) -> float:
        losses[exponent] = trial(start * step**exponent)
        return losses[exponent]

    best = 0
    loss(0)
    for direction in (1, -1):
        while len(losses) < trials and loss(best + direction) < losses[best]:
            best += direction
        if best:  # this direction lowered the loss, so the other one is not tried
            break
    rows = [{"strength": start * step**exponent, "loss": losses[exponent]} for exponent in sorted(losses)]
    return start * step**best, rows
