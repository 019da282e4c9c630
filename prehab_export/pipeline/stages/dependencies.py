"""What each stage of a run depends on, in their order: the options that its output is made by, the stages that it
reads, and when it is wanted at all. Light: nothing here loads torch."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from prehab_export.config import RunConfig, public_names


@dataclass(frozen=True)
class Dependencies:
    """Which options a stage's output depends on, which stages it reads, and when it is wanted.

    The stage's key is made from this. With something missing here, a changed option would leave an old result standing.
    """

    name: str
    options: Callable[[RunConfig], Mapping[str, Any]]
    parents: tuple[str, ...] = ()
    is_enabled: Callable[[RunConfig], bool] = lambda _config: True


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


def _card_options(config: RunConfig) -> dict[str, Any]:
    """What the model card quotes that is in no other stage's key: names, which a moved folder changes."""
    public = public_names(config)
    return {"model": public.model, "data": public.data.data}


# Stages whose figures the model card and the report quote.
_QUOTED = ("calibrate", "prehab", "truncate", "refine", "rehab", "export", "baseline", "verify", "quantize", "ort")

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
        Dependencies("baseline", lambda c: {}, ("merge",)),
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
    """The stages that this one reads, of those that these options ask for."""
    return [name for name in stage.parents if DEPENDENCIES[name].is_enabled(config)]
