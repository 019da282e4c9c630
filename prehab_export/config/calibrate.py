"""Options of calibration and of the choice of layers to compress."""

from dataclasses import dataclass

from prehab_export.config.checks import check_choice, check_minimum

FISHER_LABELS = ("data", "model")


@dataclass(frozen=True)
class CalibrateConfig:
    """How to calibrate, and which layers to compress.

    samples: largest number of samples to collect moments from.
    enough: use fewer samples if a pilot shows that fewer give every layer as many independent tokens as it has inputs;
        faster, and less accurate than all of them.
    gradient_units: units (samples of a classifier, predicted tokens of a language model) to gather gradients from:
        those of the first samples, until they are at least as many. Gradients take two thirds of the time.
    labels: labels that gradients are computed with: ``data`` (those of the data set) or ``model`` (sampled from the
        model's output).
    include: shell-style pattern of layers to compress instead of the default, such as '*.mlp.*'.
    exclude: shell-style pattern of layers to leave dense, such as '*.layer.0.*'.
    """

    samples: int = 512
    enough: bool = False
    gradient_units: int = 16384
    labels: str = "data"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_minimum("--calibration-samples", self.samples, 1)
        check_minimum("calibrate.gradient_units", self.gradient_units, 1)
        check_choice("calibrate.labels", self.labels, FISHER_LABELS)
