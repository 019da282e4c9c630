"""The dependencies of every stage, in execution order: options, parents, and the condition that enables it.

This module does not import torch, so that the command line and `status` start quickly.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from prehab_export.config import NEVER, RunConfig, public_names


@dataclass(frozen=True)
class Dependencies:
    """The dependencies of a stage.

    The stage's key is made from them. If an option is missing here, changing it does not invalidate old results.

    options: a function from a run's options to those that the stage's output depends on.
    parents: the stages whose results the stage reads.
    is_enabled: whether a run's options enable the stage.
    """

    name: str
    options: Callable[[RunConfig], Mapping[str, Any]]
    parents: tuple[str, ...] = ()
    is_enabled: Callable[[RunConfig], bool] = lambda _config: True


def _calibration_options(config: RunConfig) -> dict[str, Any]:
    # Every later stage depends on the precision. The device affects only the rounding, so it is not part of the key.
    return asdict(config.calibrate) | {"gradients": config.needs_gradients, "precision": config.precision}


def _truncation_options(config: RunConfig) -> dict[str, Any]:
    """Return the options of truncation, including block-wise refinement, which is part of it."""
    blocks = config.refine.block_schedule
    return asdict(config.cut) | {"block_refinement": asdict(blocks) if blocks.steps else None}


def _refinement_options(config: RunConfig) -> dict[str, Any]:
    return {"schedule": asdict(config.refine.schedule), "hidden_share": config.refine.hidden_share}


def _times_options(config: RunConfig) -> dict[str, Any]:
    # Measurements also depend on the machine, but a run that continues on another machine keeps its ranks.
    return {
        "threads": config.bench.threads,
        "batch": config.bench.batch_sizes[0],
        "length": config.bench.sequence_lengths[0],
        "objective": config.cut.objective,
    }


def _baseline_options(config: RunConfig) -> dict[str, Any]:
    # Whether the graph fits, if that decides, is an external input. A result that has the graph depends on neither.
    return {"dense_graph": NEVER} if config.dense_graph == NEVER else {}


def _card_options(config: RunConfig) -> dict[str, Any]:
    """Return the names in the model card. No other stage depends on them, and moving a folder changes them."""
    public = public_names(config)
    return {"model": public.model, "data": public.data.data}


# Stages whose figures appear in the model card and the report.
_QUOTED = (
    "calibrate",
    "prehab",
    "truncate",
    "refine",
    "rehab",
    "export",
    "baseline",
    "verify",
    "quantize",
    "ort",
)

DEPENDENCIES = {
    stage.name: stage
    for stage in (
        Dependencies("merge", lambda c: {}, is_enabled=lambda c: c.adapter is not None),
        Dependencies("calibrate", _calibration_options, ("merge",)),
        Dependencies("times", _times_options, ("calibrate",), lambda c: c.truncate.latency is not None),
        Dependencies(
            "prehab",
            lambda c: {"prehab": asdict(c.prehab), "truncate": _truncation_options(c)},
            ("merge", "calibrate", "times"),
            lambda c: c.prehab.train.steps > 0,
        ),
        Dependencies("truncate", _truncation_options, ("merge", "calibrate", "times", "prehab")),
        Dependencies(
            "refine",
            _refinement_options,
            ("merge", "calibrate", "prehab", "truncate"),
            lambda c: c.refine.schedule.steps > 0,
        ),
        Dependencies(
            "rehab",
            lambda c: asdict(c.rehab),
            ("merge", "calibrate", "prehab", "truncate", "refine"),
            lambda c: c.rehab.train.steps > 0,
        ),
        Dependencies(
            "export",
            lambda c: {"kv_cache": c.kv_cache, "dtype": c.dtype},
            ("truncate", "refine", "rehab"),
        ),
        Dependencies("baseline", _baseline_options, ("merge",)),
        Dependencies("verify", lambda c: {}, ("export", "baseline")),
        Dependencies(
            "quantize",
            lambda c: {
                "modes": c.quantize,
                "refit": c.quantize_refit,
                "shrinkage": c.cut.gradient_shrinkage,
            },
            ("merge", "calibrate", "prehab", "export", "baseline", "verify"),
            lambda c: bool(c.quantize),
        ),
        Dependencies("ort", lambda c: {"modes": c.quantize}, ("export", "verify", "quantize"), lambda c: c.ort),
        Dependencies("artifact", _card_options, _QUOTED),
        Dependencies("bench", lambda c: asdict(c.bench), ("artifact", "baseline", "quantize")),
        Dependencies("report", asdict, (*_QUOTED, "artifact", "bench")),
    )
}


def enabled_parents(stage: Dependencies, config: RunConfig) -> list[str]:
    """Return the parents of a stage that the options enable."""
    return [name for name in stage.parents if DEPENDENCIES[name].is_enabled(config)]
