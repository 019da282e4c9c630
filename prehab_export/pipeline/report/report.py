"""The report of a run (``report.json``, ``report.md``, plots) and the model card of its artifact."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prehab_export.pipeline.report.card import collect_facts
from prehab_export.pipeline.report.plots import plot_prehab, plot_ranks, plot_roofline
from prehab_export.pipeline.session import Session
from prehab_export.system import machine_facts, render, write_json


def write_report(session: Session, folder: Path, targets: Mapping[str, Any]) -> None:
    """Write all figures of the run as JSON, and the main figures as Markdown with plots.

    Args:
        targets: the results of each target, by name.
    """
    facts = collect_facts(session)
    facts |= {"machine": machine_facts(), "targets": targets}
    facts["size_warnings"] = size_warnings(facts)
    write_json(folder / "report.json", facts)
    plot_ranks(facts["truncate"]["layers"], folder / "ranks.png")
    plot_roofline(facts["bench"], folder / "roofline.png")
    if "prehab" in facts:
        plot_prehab(facts["prehab"]["history"], facts["metric"]["name"], folder / "prehab.png")
    (folder / "report.md").write_text(render("pipeline", "report.md.j2", facts), encoding="utf-8")


def size_warnings(facts: dict[str, Any]) -> list[str]:
    """Return a warning if the compressed graph is not smaller than the dense graph.

    The stage ``export`` warns about the weight files.
    """
    dense, compressed = facts["baseline"].get("bytes"), facts["export"]["bytes"]
    if dense is None or compressed < dense:
        return []
    return [
        f"the compressed graph ({compressed / 1e6:.1f} MB) is not smaller than the dense graph ({dense / 1e6:.1f} MB); "
        "remove more with a higher --ratio"
    ]
