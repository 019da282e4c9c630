"""The facts of a run and its model card."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prehab_export.config import public_names
from prehab_export.pipeline.session import Session
from prehab_export.system import render

# The JSON file of each stage, in the order of the report.
STAGE_FACTS = {
    "calibrate": "calibrate.json",
    "prehab": "prehab.json",
    "truncate": "truncate.json",
    "refine": "refine.json",
    "rehab": "rehab.json",
    "export": "export.json",
    "baseline": "export.json",
    "verify": "verify.json",
    "quantize": "quantize.json",
    "ort": "ort.json",
    "bench": "bench.json",
}


def write_card(session: Session, folder: Path) -> None:
    """Write the model card: a description of the model, the cost of compression and how to load the model.

    The card holds no timings. Timings depend on the machine, and the same run must produce the same artifact, byte for
    byte, on any machine.
    """
    (folder / "README.md").write_text(render("pipeline", "card.md.j2", collect_facts(session)), encoding="utf-8")


def collect_facts(session: Session) -> dict[str, Any]:
    """Return the facts of the run and of every stage that has run, as JSON types."""
    workspace, config = session.workspace, public_names(session.config)
    facts: dict[str, Any] = {
        "model": config.model,
        "data": config.data.data,
        "task": session.config.task,
        "metric": {"name": session.task.metric, "higher_is_better": session.task.higher_is_better},
        "config": asdict(config),
        "source": session.source,
        "evaluation": session.data.description | {"data": config.data.data},
    }
    for stage, name in STAGE_FACTS.items():
        if workspace.has(stage):
            facts[stage] = json.loads((workspace.folder(stage) / name).read_text(encoding="utf-8"))
    return facts
