"""How to calibrate, and which layers to compress."""

from dataclasses import dataclass

from prehab_export.config.checks import at_least, one_of

FISHER_LABELS = ("data", "model")


@dataclass(frozen=True)
class CalibrateConfig:
    """samples: how many to look at. labels: ``data`` (given ones) or ``model`` (drawn from the model's output).
    include/exclude: shell-style patterns on layer names."""

    samples: int = 512
    labels: str = "data"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least("--calibration-samples", self.samples, 1)
        one_of("--fisher-labels", self.labels, FISHER_LABELS)
