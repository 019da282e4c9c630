"""The report of a run (``report.json``, ``report.md``, plots) and the model card of its artifact."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prehab_export.config import RunConfig
from prehab_export.machine import machine_facts
from prehab_export.plots import plot_prehab, plot_ranks, plot_roofline
from prehab_export.rendering import render
from prehab_export.session import Session
from prehab_export.workspace import write_json

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


def write_report(session: Session, folder: Path, targets: Mapping[str, Any]) -> None:
    """Everything that is known of the run: all figures as JSON, the main ones as Markdown with plots.

    Args:
        targets: name → what was measured elsewhere (``targets.results``).
    """
    facts = collect(session)
    facts |= {"machine": machine_facts(), "targets": targets}
    facts["size_warnings"] = size_warnings(facts)
    write_json(folder / "report.json", facts)
    plot_ranks(facts["truncate"]["layers"], folder / "ranks.png")
    plot_roofline(facts["bench"], folder / "roofline.png")
    if "prehab" in facts:
        plot_prehab(facts["prehab"]["history"], facts["metric"]["name"], folder / "prehab.png")
    (folder / "report.md").write_text(render("report.md.j2", facts), encoding="utf-8")


def size_warnings(facts: dict[str, Any]) -> list[str]:
    """What is to be said of a compressed graph that is no smaller than the dense one; of the weights it is said, and
    noted, as they are written."""
    dense, compressed = (facts[side]["bytes"] for side in ("baseline", "export"))
    if compressed < dense:
        return []
    return [
        f"the compressed graph ({compressed / 1e6:.1f} MB) is not smaller than the dense one ({dense / 1e6:.1f} MB); "
        "remove more, with a higher --ratio"
    ]


def write_card(session: Session, folder: Path) -> None:
    """The model card: what the model is, what compression cost, how to load it. No timings: they belong to a
    machine, and the artifact must come out the same, byte for byte, wherever a run is repeated."""
    (folder / "README.md").write_text(render("card.md.j2", collect(session)), encoding="utf-8")


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


def public_names(config: RunConfig) -> RunConfig:
    """Hub ids as they are; of local paths only the last part, since the rest is one machine's business."""

    def name(place: str) -> str:
        return Path(place).resolve().name if Path(place).exists() else place

    adapter = None if config.adapter is None else name(config.adapter)
    return replace(
        config, model=name(config.model), adapter=adapter, data=replace(config.data, data=name(config.data.data))
    )
