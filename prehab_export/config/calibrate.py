"""How to calibrate, and which layers to compress."""

from dataclasses import dataclass

from prehab_export.config.checks import at_least, one_of

FISHER_LABELS = ("data", "model")


@dataclass(frozen=True)
class CalibrateConfig:
    """How to calibrate, and which layers to compress.

    samples: samples to gather moments from.
    labels: labels behind the gradients: ``data`` (given ones) or ``model`` (drawn from the model's output).
    include: shell-style pattern of layers to compress instead of the default, such as '*.mlp.*'.
    exclude: shell-style pattern of layers to leave dense, such as '*.layer.0.*'.
    """

    samples: int = 512
    labels: str = "data"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least("--calibration-samples", self.samples, 1)
        one_of("calibrate.labels", self.labels, FISHER_LABELS)
