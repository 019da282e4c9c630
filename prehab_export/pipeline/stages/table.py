"""The stages of a run: folder in, folder out. Each reads what earlier ones published and writes its own.

The work itself is done by ordinary functions on ordinary objects (``calibrate``, ``prehab``, ``truncate`` …); what
stands here only fetches their input and puts their output away.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prehab_export.config import RunConfig
from prehab_export.pipeline.latency_budget import time_ranks
from prehab_export.pipeline.report.card import public_names
from prehab_export.pipeline.report.report import write_report
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.stages.calibrate import calibrate_dense, merge_adapter
from prehab_export.pipeline.stages.compress import truncate_prepared
from prehab_export.pipeline.stages.export import export_artifact, export_baseline
from prehab_export.pipeline.stages.measure import bench_graphs, target_results
from prehab_export.pipeline.stages.ort import write_ort_files
from prehab_export.pipeline.stages.publish import publish_artifact
from prehab_export.pipeline.stages.quantize import quantize
from prehab_export.pipeline.stages.train import prehab_dense, refine_factors, rehab_factors
from prehab_export.pipeline.stages.verify import verify_in_fresh_process


@dataclass(frozen=True)
class Stage:
    """What a stage does, which options its output depends on, which stages it reads, when it is wanted, and what it
    reads besides. All that it reads is named here: from it the stage's key is made, and with a wrong one a changed
    option would leave an old result standing."""

    name: str
    work: Callable[[Session, Path], None]
    options: Callable[[RunConfig], Mapping[str, Any]]
    parents: tuple[str, ...] = ()
    wanted: Callable[[RunConfig], bool] = lambda _config: True
    outside: Callable[[Session], Mapping[str, Any]] = lambda _session: {}


def _calibration_options(config: RunConfig) -> dict[str, Any]:
    # Of the precision depends all that follows; the device changes no more than the rounding.
    return asdict(config.calibrate) | {"gradients": config.needs_gradients, "precision": config.precision}


def _truncation_options(config: RunConfig) -> dict[str, Any]:
    """Truncation as it is carried out: block-wise refinement is part of it, where there is any."""
    blocks = config.refine.block_schedule
    return asdict(config.cut) | {"block_refinement": asdict(blocks) if blocks.steps else None}


def _refinement_options(config: RunConfig) -> dict[str, Any]:
    return {"schedule": asdict(config.refine.schedule), "hidden_share": config.refine.hidden_share}


def _times_options(config: RunConfig) -> dict[str, Any]:
    # Everything measured depends on the machine too, but a run that goes on elsewhere keeps what it was planned by.
    return {
        "threads": config.bench.threads,
        "batch": config.bench.batch_sizes[0],
        "length": config.bench.sequence_lengths[0],
        "objective": config.cut.objective,
    }


def _judging(session: Session) -> dict[str, Any]:
    """What the task's metric is taken over. The few samples that a graph is checked on may be any."""
    return {"evaluation": session.data.evaluation_fingerprint}


def _card_options(config: RunConfig) -> dict[str, Any]:
    """What the model card quotes that is in no other stage's key: names, which a moved folder changes."""
    public = public_names(config)
    return {"model": public.model, "data": public.data.data}


# Stages whose figures the model card and the report quote.
_QUOTED = ("calibrate", "prehab", "truncate", "refine", "rehab", "export", "baseline", "verify", "quantize", "ort")

STAGES = {
    stage.name: stage
    for stage in (
        Stage("merge", merge_adapter, lambda c: {}, wanted=lambda c: c.adapter is not None),
        Stage("calibrate", calibrate_dense, _calibration_options, ("merge",)),
        Stage("times", time_ranks, _times_options, ("calibrate",), lambda c: c.truncate.latency is not None),
        Stage(
            "prehab",
            prehab_dense,
            lambda c: {"prehab": asdict(c.prehab), "truncate": _truncation_options(c)},
            ("merge", "calibrate", "times"),
            lambda c: c.prehab.train.steps > 0,
        ),
        Stage("truncate", truncate_prepared, _truncation_options, ("merge", "calibrate", "times", "prehab")),
        Stage(
            "refine",
            refine_factors,
            _refinement_options,
            ("merge", "calibrate", "prehab", "truncate"),
            lambda c: c.refine.schedule.steps > 0,
        ),
        Stage(
            "rehab",
            rehab_factors,
            lambda c: asdict(c.rehab),
            ("merge", "calibrate", "prehab", "truncate", "refine"),
            lambda c: c.rehab.train.steps > 0,
        ),
        Stage(
            "export",
            lambda session, folder: export_artifact(session.on_cpu, folder),
            lambda c: {"kv_cache": c.kv_cache, "dtype": c.dtype},
            ("truncate", "refine", "rehab"),
        ),
        Stage(
            "baseline",
            lambda session, folder: export_baseline(session.on_cpu, folder),
            lambda c: {},
            ("merge",),
            outside=_judging,
        ),
        Stage(
            "verify",
            lambda session, folder: verify_in_fresh_process(session.on_cpu, folder),
            lambda c: {},
            ("export", "baseline"),
            outside=_judging,
        ),
        Stage(
            "quantize",
            lambda session, folder: quantize(session.on_cpu, folder),
            lambda c: {
                "modes": c.quantize,
                "refit": c.quantize_refit,
                "shrinkage": c.cut.gradient_shrinkage,
            },
            ("merge", "calibrate", "prehab", "export", "baseline", "verify"),
            lambda c: bool(c.quantize),
            _judging,
        ),
        Stage(
            "ort",
            lambda session, folder: write_ort_files(session.on_cpu, folder),
            lambda c: {"modes": c.quantize},
            ("export", "verify", "quantize"),
            lambda c: c.ort,
        ),
        Stage("artifact", publish_artifact, _card_options, _QUOTED),
        Stage("bench", bench_graphs, lambda c: asdict(c.bench), ("artifact", "baseline", "quantize")),
        Stage(
            "report",
            lambda session, folder: write_report(session, folder, target_results(session)),
            asdict,
            (*_QUOTED, "artifact", "bench"),
            outside=lambda session: {"targets": target_results(session)},
        ),
    )
}
