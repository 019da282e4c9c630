"""How a bench measures. Light to import, so that a command line can build its options from the defaults."""

import math
from dataclasses import dataclass, field

from converters.errors import InputError
from prehab_export.machine import available_cores


@dataclass(frozen=True)
class BenchConfig:
    """How to measure.

    threads: intra-op threads of each session.
    batch_sizes, sequence_lengths: every pair is a case; models that take no tokens use batch sizes only. For a
        decoder with a cache the sequence is the prompt, and a request goes on to make ``new_tokens`` tokens.
    warmup: unmeasured requests of each model before the first round.
    rounds: turns of each model.
    min_seconds: least length of a turn; a request that takes longer is always finished.
    timeout_s: how long a worker may take for one answer (loading, warming up, or one turn).

    Raises:
        InputError: a value is out of range.
    """

    threads: int = field(default_factory=available_cores)
    batch_sizes: tuple[int, ...] = (1,)
    sequence_lengths: tuple[int, ...] = (128,)
    warmup: int = 3
    rounds: int = 20
    min_seconds: float = 0.1
    new_tokens: int = 32
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("warmup", 0), ("rounds", 1), ("new_tokens", 1)):
            at_least(name, getattr(self, name), least)
        for name in ("batch_sizes", "sequence_lengths"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty: give at least one")
            for value in getattr(self, name):
                at_least(name, value, 1)
        if not (math.isfinite(self.min_seconds) and self.min_seconds >= 0):
            raise InputError(f"min_seconds is {self.min_seconds}: give 0 or more seconds")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise InputError(f"timeout_s is {self.timeout_s}: give more than 0 seconds")


def at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} is {value!r}: give a whole number, {least} or more")
