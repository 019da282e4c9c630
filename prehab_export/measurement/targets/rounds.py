"""How far the measurement of a kit is, by the lines that its runner and its page write at the start of each round."""

import re
from collections.abc import Sequence

from prehab_export.measurement.targets.kit import Kit
from prehab_export.measurement.targets.watched import Watch
from prehab_export.system import Advance

ROUND = re.compile(r": round \d+ of \d+$")


def rounds_of(kit: Kit, threads: Sequence[int] | None = None) -> int:
    """How many rounds a kit takes, at these numbers of threads or at its own."""
    protocol = kit.facts["protocol"]
    counts = protocol["threads"] if threads is None else threads
    return len(counts) * len(kit.facts["cases"]) * protocol["rounds"]


def follow(advance: Advance) -> Watch:
    """Takes lines: each is shown, and a step is counted where it tells of a round."""
    return lambda line: advance(1 if ROUND.search(line) else 0, line)
