"""Options of training: schedules, prehab before truncation, and refinement and rehab after it."""

from dataclasses import dataclass, field, replace

from converters.errors import InputError
from prehab_export.config.checks import AUTO, check_choice, check_minimum, check_share

SURROGATES = ("tail", "nuclear", "stable-rank", "spectral", "stochastic-stable-rank")
UPDATES = ("gradient", "proximal")
PROXIMAL_SURROGATES = ("tail", "nuclear")
LAYER_WEIGHTS = ("loss", "fisher", "equal")
SCHEDULES = ("constant", "warmup")
WHITENINGS = ("activation", "fisher")
USUAL_STRENGTH = 100.0
REHAB_METHODS = ("factors", "all", "lora")


@dataclass(frozen=True)
class Schedule:
    """How long to train, and how fast.

    steps: number of optimiser steps; 0 skips the training.
    batch_size: samples per step.
    learning_rate: peak learning rate.
    warmup: share of the steps during which the learning rate rises to its peak.
    weight_decay: decoupled weight decay.
    clip: maximum norm of the gradient of a step.
    """

    steps: int = 0
    batch_size: int = 32
    learning_rate: float = 3e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_minimum("the number of steps", self.steps, 0)
        check_minimum("the batch size", self.batch_size, 1)
        if not 0 < self.learning_rate < 1:
            raise InputError(f"the learning rate must lie between 0 and 1, not {self.learning_rate}")


@dataclass(frozen=True)
class TrainConfig(Schedule):
    """How long to train, how fast, and with which loss.

    distill: share of the loss, in [0, 1], that is the KL divergence from the dense model's output; 0 trains on the
        labels alone.
    """

    distill: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("the distillation share", self.distill)


@dataclass(frozen=True)
class RefineSchedule(Schedule):
    """How long to refine, and how fast.

    Batches are small by default: with the same samples, more steps leave a smaller divergence from the dense model.
    """

    batch_size: int = 8
    learning_rate: float = 5e-4


@dataclass(frozen=True)
class RefineConfig:
    """How to refine: fitting the factors to the dense model, without labels.

    schedule: schedule of the end-to-end phase, which uses the inputs of all training samples.
    block_steps: steps on each block separately, on the calibration sample, before the end-to-end phase; 0 skips them.
    block_learning_rate: peak learning rate of the block-wise phase.
    hidden_share: weight of the error of hidden states in the end-to-end loss, in [0, 1].
    """

    schedule: RefineSchedule = field(default_factory=RefineSchedule)
    block_steps: int = 0
    block_learning_rate: float = 1e-3
    hidden_share: float = 0.0

    def __post_init__(self) -> None:
        check_minimum("--refine-block-steps", self.block_steps, 0)
        check_share("refine.hidden_share", self.hidden_share)

    @property
    def block_schedule(self) -> Schedule:
        """The schedule of the block-wise phase."""
        return replace(self.schedule, steps=self.block_steps, learning_rate=self.block_learning_rate)


@dataclass(frozen=True)
class PrehabConfig:
    """How to prehab: a short training that prepares the weights for truncation.

    train: steps and loss of the training.
    surrogate: smooth surrogate of the rank that is added to the loss. It is scaled to 1 at the start, so that λ means
        the same for every model.
    strength: λ, the weight of the surrogate, such as 30; ``auto`` determines it by short trials.
    trials: maximum number of trials that ``auto`` makes to determine λ.
    schedule: how λ changes during training: ``constant``, or ``warmup`` (exponential rise over the first half).
    whitening: metric of the surrogate: ``activation`` (C alone) or ``fisher`` (C and G).
    update: how the surrogate changes the weights: ``gradient`` (its gradient is added to the task's) or ``proximal``
        (the weight is shrunk directly, as by decoupled weight decay, at a rate of λ times the learning rate per step).
        Only tail and nuclear have a proximal update.
    every: number of steps between evaluations of a layer's surrogate; its gradient is reused in between.
    layer_weights: λ of a layer relative to the others: proportional to the predicted ``loss`` of truncating it, to its
        ``fisher`` energy tr(G W C Wᵀ), or ``equal``.
    refresh_every: steps between updates of moments, bases and, under ``loss`` allocation, ranks.
    refresh_samples: number of samples that an update of the moments uses.
    guard: keep the result only if it improves the truncated model on held-out samples.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    surrogate: str = "tail"
    strength: float | str = USUAL_STRENGTH
    trials: int = 5
    schedule: str = "constant"
    whitening: str = "fisher"
    update: str = "proximal"
    every: int = 8
    layer_weights: str = "loss"
    refresh_every: int = 64
    refresh_samples: int = 32
    guard: bool = True

    def __post_init__(self) -> None:
        check_choice("--surrogate", self.surrogate, SURROGATES)
        check_choice("prehab.schedule", self.schedule, SCHEDULES)
        check_choice("prehab.whitening", self.whitening, WHITENINGS)
        check_choice("prehab.update", self.update, UPDATES)
        if self.update == "proximal" and self.surrogate not in PROXIMAL_SURROGATES:
            raise InputError(
                f"--surrogate {self.surrogate} has no proximal map; use --set prehab.update=gradient, or one of "
                f"{', '.join(PROXIMAL_SURROGATES)}"
            )
        check_choice("prehab.layer_weights", self.layer_weights, LAYER_WEIGHTS)
        check_minimum("prehab.every", self.every, 1)
        check_minimum("prehab.refresh_every", self.refresh_every, 1)
        check_minimum("prehab.refresh_samples", self.refresh_samples, 1)
        check_minimum("prehab.trials", self.trials, 1)
        if self.strength != AUTO and not (isinstance(self.strength, float) and 0 <= self.strength < float("inf")):
            raise InputError(f"--prehab-lambda must be auto, or a number of 0 or more, not {self.strength}")

    @property
    def needs_gradients(self) -> bool:
        """Whether calibration must collect gradient moments."""
        return self.train.steps > 0 and (self.whitening == "fisher" or self.layer_weights != "equal")


@dataclass(frozen=True)
class RehabConfig:
    """How to rehab: a short training of the compressed model, with labels.

    train: steps and loss of the training.
    method: parameters to train: the ``factors``, ``all`` (the factors and all parameters that were not truncated), or
        ``lora`` adapters on the factors.
    lora_rank: rank of the ``lora`` adapters.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    method: str = "factors"
    lora_rank: int = 16

    def __post_init__(self) -> None:
        check_choice("--rehab-method", self.method, REHAB_METHODS)
        check_minimum("--lora-rank", self.lora_rank, 1)
