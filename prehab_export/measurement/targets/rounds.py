"""Progress of a kit's measurement, from the lines that its runner and its page write at the start of each round."""

import re
from collections.abc import Sequence

from prehab_export.measurement.targets.kit import Kit
from prehab_export.measurement.targets.process_output import Watch
from prehab_export.system import Advance

ROUND = re.compile(r": round \d+ of \d+$")


def count_rounds(kit: Kit, threads: Sequence[int] | None = None) -> int:
    """Return the number of rounds of a kit, with the given numbers of threads or with those of the kit."""
    protocol = kit.facts["protocol"]
    thread_counts = protocol["threads"] if threads is None else threads
    return len(thread_counts) * len(kit.facts["cases"]) * protocol["rounds"]


def follow(advance: Advance) -> Watch:
    """Return a function that displays each line it receives, and counts one step for each line that starts a round."""
    return lambda line: advance(1 if ROUND.search(line) else 0, line)
