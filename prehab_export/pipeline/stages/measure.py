"""The stage that measures a run's graphs on this machine, and the results of other targets."""

from pathlib import Path
from typing import Any

from converters.model_config import vocabulary_size
from prehab_export.measurement import bench
from prehab_export.pipeline.checks import bench_config
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.stages.quantize import graph_hashes, run_graphs
from prehab_export.pipeline.target_results import matching_target_results
from prehab_export.system import bar, write_json


def bench_graphs(session: Session, folder: Path) -> None:
    """Measure the run's graphs and write ``bench.json``."""
    vocabulary = vocabulary_size(session.model_config)
    has_baseline = session.dense_graph is not None
    result = bench(run_graphs(session), bench_config(session), vocabulary, bar, has_baseline=has_baseline)
    write_json(folder / "bench.json", result)


def target_results(session: Session) -> dict[str, Any]:
    """Return target name → results, for the run's current graphs."""
    return matching_target_results(session.workspace.root, graph_hashes(session))
