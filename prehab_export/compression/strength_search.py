"""λ found by what it is for: the loss of the compressed model on samples that training did not see.

An open question of Prehab (arXiv 2512.01980). Each trial is a short prehab and a truncation; the search climbs from
the default in steps of √10 on a logarithmic scale, in the direction that pays, until it no longer does or the budget
is spent.
"""

from collections.abc import Callable
from math import sqrt

STEP = sqrt(10)


def find_strength(
    trial: Callable[[float], float], start: float, trials: int, step: float = STEP
) -> tuple[float, list[dict[str, float]]]:
    """The λ with the lowest loss among at most ``trials`` of them, and what each gave.

    Args:
        trial: λ → loss of the compressed model.
        start: first λ to try.

    >>> from math import log10
    >>> best, rows = find_strength(lambda strength: (log10(strength) - 3) ** 2, start=100.0, trials=6)
    >>> round(best), len(rows)
    (1000, 4)
    """
    losses: dict[int, float] = {}

    def loss(at: int) -> float:
        losses[at] = trial(start * step**at)
        return losses[at]

    best = 0
    loss(0)
    for direction in (1, -1):
        while len(losses) < trials and loss(best + direction) < losses[best]:
            best += direction
        if best:  # one direction paid; the other was passed on the way here
            break
    rows = [{"strength": start * step**at, "loss": losses[at]} for at in sorted(losses)]
    return start * step**best, rows
