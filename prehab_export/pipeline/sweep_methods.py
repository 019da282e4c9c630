"""The methods that a sweep can compare, by name.

This module does not import torch, so that the command line can list the methods quickly.
"""

from dataclasses import dataclass, replace

from prehab_export.config import PARAMETERS, TruncateConfig


@dataclass(frozen=True)
class Method:
    """A choice of truncation options.

    refined: whether end-to-end refinement of the factors follows.
    """

    name: str
    objective: str
    allocation: str
    drift_correction: bool = False
    refined: bool = False

    def at(self, ratio: float, base: TruncateConfig) -> TruncateConfig:
        """Return ``base`` with this method's options and this ratio."""
        return replace(
            base,
            ratio=ratio,
            budget=PARAMETERS,
            objective=self.objective,
            allocation=self.allocation,
            drift_correction=self.drift_correction,
        )


METHODS = {
    method.name: method
    for method in (
        Method("svd", "weight", "uniform"),
        Method("svd-llm", "activation", "uniform"),
        Method("fisher-uniform", "fisher", "uniform"),
        Method("fisher", "fisher", "loss"),
        Method("drift", "fisher", "loss", drift_correction=True),
        Method("refined", "fisher", "loss", drift_correction=True, refined=True),
    )
}
