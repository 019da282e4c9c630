"""``--dense-graph``: the choice whether a run has a graph of the dense model, and what cannot be done without one.

The choice stays the same from one command to the next on the same machine. It depends on the memory that the options
allow or the machine has, not on what is free. Room on the disk counts only until there is a result.
"""

from collections.abc import Callable

import psutil

from converters.errors import InputError
from prehab_export.config import ALWAYS, NEVER, memory_bytes
from prehab_export.pipeline.checks import disk_needed
from prehab_export.pipeline.dense_graph import DISK, MEMORY, MissingDenseGraph
from prehab_export.pipeline.memory import Memory
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.workload import count_workload
from prehab_export.system import format_bytes, free_space, machine_facts

# Bytes that this process holds before the stage begins: libraries and data. The bytes of the moment would vary.
LOADED = 600e6


def choose_dense_graph(session: Session, has_baseline: Callable[[Session], bool]) -> MissingDenseGraph | None:
    """Return why the run is to have no dense graph, or None if it is to have one.

    Args:
        has_baseline: whether the stage ``baseline`` has a result that matches this session. It selects the results
            that match.
    """
    choice = session.config.dense_graph
    if choice == NEVER:
        return MissingDenseGraph(NEVER, "the options say --dense-graph never")
    if choice == ALWAYS:
        return None
    if (missing := lack_of_memory(Memory(session.config, count_workload(session), 1.0))) is not None:
        return missing
    if has_baseline(session):
        return None
    lacks_room = disk_needed(session) > free_space(session.workspace.root)
    missing = MissingDenseGraph(DISK, "the disk has no room for it")
    return missing if has_baseline(session.without_dense_graph(missing)) or lacks_room else None


def lack_of_memory(memory: Memory) -> MissingDenseGraph | None:
    """Return that an export of the dense model takes more than ``--max-memory`` or, without it, than the machine has;
    None if it does not."""
    held = LOADED + memory.need("baseline").held
    if held <= (memory_bytes(memory.config.max_memory) or machine_memory()):
        return None
    return MissingDenseGraph(
        MEMORY, f"its export would take about {format_bytes(round(held))} of memory, more than the run may take"
    )


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of this process's control group if that has less."""
    total, limit = psutil.virtual_memory().total, machine_facts()["memory_limit_mb"]
    return total if limit is None else min(total, int(limit * 1e6))


def check_comparisons(session: Session) -> None:
    """Refuse a run that is to be compared with the dense graph and has none.

    Raises:
        InputError: ``--min-speedup`` is given, and there is no dense graph.
    """
    if session.missing_dense_graph is not None and session.config.min_speedup is not None:
        raise InputError(
            f"--min-speedup compares with the dense graph, and there is none: {session.missing_dense_graph.reason}; "
            "--dense-graph always makes it"
        )
