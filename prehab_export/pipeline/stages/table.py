"""The table of stages. Every stage reads the results of its parents and writes its own result to a folder.

The work is done by functions on objects in memory (``calibrate``, ``prehab``, ``truncate`` …). The functions in this
package only load their input and save their output. `dependencies` lists what each stage depends on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prehab_export.pipeline.latency_budget import time_ranks
from prehab_export.pipeline.report.report import write_report
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.stages.calibrate import calibrate_dense, merge_adapter
from prehab_export.pipeline.stages.compress import truncate_prepared
from prehab_export.pipeline.stages.dependencies import DEPENDENCIES, Dependencies
from prehab_export.pipeline.stages.export import export_artifact, export_baseline
from prehab_export.pipeline.stages.measure import bench_graphs, target_results
from prehab_export.pipeline.stages.ort import write_ort_files
from prehab_export.pipeline.stages.publish import publish_artifact
from prehab_export.pipeline.stages.quantize import quantize
from prehab_export.pipeline.stages.train import prehab_dense, refine_factors, rehab_factors
from prehab_export.pipeline.stages.verify import verify_in_fresh_process


@dataclass(frozen=True)
class Stage(Dependencies):
    """A stage: its dependencies, its work, and the inputs that it reads besides its options and parents.

    work: writes the stage's result into a folder.
    external_inputs: returns name → fingerprint of the additional inputs, which become part of the stage's key.
    """

    work: Callable[[Session, Path], None] = field(kw_only=True)
    external_inputs: Callable[[Session], Mapping[str, Any]] = field(kw_only=True)


def _evaluation_data(session: Session) -> dict[str, Any]:
    """Fingerprint the data that the task's metric is computed on. Parity checks may use any samples."""
    return {"evaluation": session.data.evaluation_fingerprint}


def _baseline_inputs(session: Session) -> dict[str, Any]:
    """Fingerprint the evaluation data, and what is in the way of a dense graph if `_baseline_options` does not say."""
    missing = session.missing_dense_graph
    return _evaluation_data(session) | (missing.inputs if missing is not None else {})


def _target_measurements(session: Session) -> dict[str, Any]:
    return {"targets": target_results(session)}


WORK: dict[str, Callable[[Session, Path], None]] = {
    "merge": merge_adapter,
    "calibrate": calibrate_dense,
    "times": time_ranks,
    "prehab": prehab_dense,
    "truncate": truncate_prepared,
    "refine": refine_factors,
    "rehab": rehab_factors,
    "export": lambda session, folder: export_artifact(session.on_cpu, folder),
    "baseline": lambda session, folder: export_baseline(session.on_cpu, folder),
    "verify": lambda session, folder: verify_in_fresh_process(session.on_cpu, folder),
    "quantize": lambda session, folder: quantize(session.on_cpu, folder),
    "ort": lambda session, folder: write_ort_files(session.on_cpu, folder),
    "artifact": publish_artifact,
    "bench": bench_graphs,
    "report": lambda session, folder: write_report(session, folder, target_results(session)),
}

EXTERNAL_INPUTS: dict[str, Callable[[Session], Mapping[str, Any]]] = {
    "baseline": _baseline_inputs,
    "verify": _evaluation_data,
    "quantize": _evaluation_data,
    "report": _target_measurements,
}

STAGES = {
    name: Stage(**vars(dependencies), work=WORK[name], external_inputs=EXTERNAL_INPUTS.get(name, lambda _session: {}))
    for name, dependencies in DEPENDENCIES.items()
}
