"""The result of a verb, and the check of ``--min-speedup``."""

from typing import Any

from prehab_export.pipeline.report.card import STAGE_FACTS
from prehab_export.pipeline.workspace import Workspace
from prehab_export.system import BudgetError

# The verbs that end with a report.
REPORT_VERBS = ("run", "report", "demo")


def read_result(workspace: Workspace, verb: str) -> dict[str, Any]:
    """Return the JSON facts of a verb's stage.

    A verb that ends with a report has the full report. ``export`` has the facts of the dense model as well, under
    ``baseline``. A stage that the run's options do not ask for is marked as skipped.
    """
    if verb in REPORT_VERBS:
        return workspace.read_json("report", "report.json")
    if not workspace.has(verb):
        return {"stage": verb, "skipped": True}
    facts = workspace.read_json(verb, STAGE_FACTS[verb])
    return facts | {"baseline": workspace.read_json("baseline", STAGE_FACTS["baseline"])} if verb == "export" else facts


def check_speed(workspace: Workspace, min_speedup: float) -> None:
    """Check the speedup of every compressed graph.

    Raises:
        BudgetError: a compressed graph is less than ``min_speedup`` times as fast as the dense float32 graph.
    """
    slow = [
        f"{row['model']} {row['speedup']:.2f}× {describe_sizes(row)}"
        for row in read_result(workspace, "bench")["comparison"]
        if row["model"].startswith("compressed") and row["speedup"] < min_speedup
    ]
    if slow:
        raise BudgetError(
            f"less than --min-speedup {min_speedup:g}: {'; '.join(slow)}; the figures are in the run's folder"
        )


def describe_sizes(row: dict[str, Any]) -> str:
    """Return the batch size and the sequence length of a benchmark row, in words."""
    return f"at batch {row['batch']}" + (f", length {row['sequence']}" if row["sequence"] else "")
