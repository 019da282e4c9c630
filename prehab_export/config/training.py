"""How to train: schedules, prehab before truncation, refinement and rehab after it."""

from dataclasses import dataclass, field, replace

from converters.errors import InputError
from prehab_export.config.checks import AUTO, at_least, check_share, one_of

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

    steps: number of steps; 0 skips it.
    batch_size: samples per step.
    learning_rate: peak learning rate.
    warmup: share of the steps over which the learning rate rises to its peak.
    weight_decay: decoupled weight decay.
    clip: largest norm of a step's gradient.
    """

    steps: int = 0
    batch_size: int = 32
    learning_rate: float = 3e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        at_least("the number of steps", self.steps, 0)
        at_least("the batch size", self.batch_size, 1)
        if not 0 < self.learning_rate < 1:
            raise InputError(f"the learning rate must lie between 0 and 1, not {self.learning_rate}")


@dataclass(frozen=True)
class TrainConfig(Schedule):
    """How long to train, how fast, and towards what.

    distill: share of the loss, in [0, 1], that is the KL divergence from the dense model's output; 0 trains on the
        labels alone.
    """

    distill: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("the distillation share", self.distill)


@dataclass(frozen=True)
class RefineSchedule(Schedule):
    """How long to tune, and how fast. Batches are small: as many samples in more steps leave a smaller divergence."""

    batch_size: int = 8
    learning_rate: float = 5e-4


@dataclass(frozen=True)
class RefineConfig:
    """Tuning of the factors towards the dense model, without labels.

    schedule: of the end-to-end part, on the inputs of all training samples.
    block_steps: steps of each block by itself, on the calibration sample, before the end-to-end part; 0 skips them.
    block_learning_rate: peak learning rate of the block-wise part.
    hidden_share: share of the end-to-end loss, in [0, 1], that is the error of hidden states.
    """

    schedule: RefineSchedule = field(default_factory=RefineSchedule)
    block_steps: int = 0
    block_learning_rate: float = 1e-3
    hidden_share: float = 0.0

    def __post_init__(self) -> None:
        at_least("--refine-block-steps", self.block_steps, 0)
        check_share("refine.hidden_share", self.hidden_share)

    @property
    def block_schedule(self) -> Schedule:
        return replace(self.schedule, steps=self.block_steps, learning_rate=self.block_learning_rate)


@dataclass(frozen=True)
class PrehabConfig:
    """How to prehab: a short training before truncation, towards weights that it hurts less.

    train: steps and loss of the training.
    surrogate: smooth stand-in for rank that is added to the loss. It is 1 at the start, so that λ means the same for
        every model.
    strength: λ, the weight of the surrogate, such as 30; ``auto`` finds it by short trials.
    trials: trials that ``auto`` may spend on λ.
    schedule: course of λ: ``constant``, or ``warmup`` (it rises exponentially over the first half).
    whitening: metric of the surrogate: ``activation`` (C alone) or ``fisher`` (C and G).
    update: how the surrogate acts: ``gradient`` (its gradient joins the task's) or ``proximal`` (the weight is shrunk
        directly, as by decoupled weight decay: a rate of λ times the learning rate a step). Only tail and nuclear have
        the latter.
    every: steps from one evaluation of a layer's surrogate to the next; its gradient is held in between.
    layer_weights: λ of a layer relative to the others: in proportion to the ``loss`` that truncation is predicted to
        cost there, to its ``fisher`` energy tr(G W C Wᵀ), or ``equal``.
    refresh_every: steps between fresh moments, bases and, under ``loss`` allocation, ranks.
    refresh_samples: samples that a refresh looks at.
    guard: keep the result only if the truncated model is better for it on held-out samples.
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
        one_of("--surrogate", self.surrogate, SURROGATES)
        one_of("prehab.schedule", self.schedule, SCHEDULES)
        one_of("prehab.whitening", self.whitening, WHITENINGS)
        one_of("prehab.update", self.update, UPDATES)
        if self.update == "proximal" and self.surrogate not in PROXIMAL_SURROGATES:
            raise InputError(
                f"--surrogate {self.surrogate} has no proximal map; give --set prehab.update=gradient, or one of "
                f"{', '.join(PROXIMAL_SURROGATES)}"
            )
        one_of("prehab.layer_weights", self.layer_weights, LAYER_WEIGHTS)
        at_least("prehab.every", self.every, 1)
        at_least("prehab.refresh_every", self.refresh_every, 1)
        at_least("prehab.refresh_samples", self.refresh_samples, 1)
        at_least("prehab.trials", self.trials, 1)
        if self.strength != AUTO and not (isinstance(self.strength, float) and 0 <= self.strength < float("inf")):
            raise InputError(f"--prehab-lambda must be auto, or a number of 0 or more, not {self.strength}")

    @property
    def needs_gradients(self) -> bool:
        return self.train.steps > 0 and (self.whitening == "fisher" or self.layer_weights != "equal")


@dataclass(frozen=True)
class RehabConfig:
    """How to rehab: a short training of the compressed model, with labels.

    train: steps and loss of the training.
    method: what is tuned: the ``factors``, ``all`` (factors, and what was never cut), or ``lora`` adapters on the
        factors.
    lora_rank: rank of the adapters of ``lora``.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    method: str = "factors"
    lora_rank: int = 16

    def __post_init__(self) -> None:
        one_of("--rehab-method", self.method, REHAB_METHODS)
        at_least("--lora-rank", self.lora_rank, 1)
