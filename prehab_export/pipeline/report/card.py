"""The facts of a run, and the model card made of them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prehab_export.config import public_names
from prehab_export.pipeline.session import Session
from prehab_export.system import render

# Stage → the JSON file that it leaves, in the order of the report.
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
    """The model card: what the model is, what compression cost, how to load it. No timings: they belong to a
    machine, and the artifact must come out the same, byte for byte, wherever a run is repeated."""
    (folder / "README.md").write_text(render("pipeline", "card.md.j2", collect(session)), encoding="utf-8")


def collect(session: Session) -> dict[str, Any]:
    """The facts of every stage that has run."""
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
