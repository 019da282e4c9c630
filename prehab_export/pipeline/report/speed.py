"""Results of a verb, and whether the compressed graphs are as fast as was asked."""

from typing import Any

from prehab_export.pipeline.report.card import STAGE_FACTS
from prehab_export.pipeline.workspace import Workspace
from prehab_export.system import BudgetError

# Verbs that end in a report.
WHOLE_RUNS = ("run", "report", "demo")


def result_of(workspace: Workspace, verb: str) -> dict[str, Any]:
    """The JSON that a verb's stage left: of ``report`` all there is, of ``export`` the dense twin's beside its own."""
    if verb in WHOLE_RUNS:
        return workspace.read_json("report", "report.json")
    if not workspace.has(verb):
        return {"stage": verb, "skipped": True}
    facts = workspace.read_json(verb, STAGE_FACTS[verb])
    return facts | {"baseline": workspace.read_json("baseline", STAGE_FACTS["baseline"])} if verb == "export" else facts


def check_speed(workspace: Workspace, least: float) -> None:
    """Raises:
    BudgetError: a compressed graph is less than ``least`` times as fast as the dense float32 one.
    """
    slow = [
        f"{row['model']} {row['speedup']:.2f}× {sizes_of(row)}"
        for row in result_of(workspace, "bench")["comparison"]
        if row["model"].startswith("compressed") and row["speedup"] < least
    ]
    if slow:
        raise BudgetError(f"less than --min-speedup {least:g}: {'; '.join(slow)}; the figures are in the run's folder")


def sizes_of(row: dict[str, Any]) -> str:
    return f"at batch {row['batch']}" + (f", length {row['sequence']}" if row["sequence"] else "")
