"""The stages of a run: folder in, folder out. Each reads what earlier ones published and writes its own.

The work itself is done by ordinary functions on ordinary objects (``calibrate``, ``prehab``, ``truncate`` …); what
stands here only fetches their input and puts their output away.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from converters.adapters import merge_dense_adapter
from converters.folder import from_pretrained, save_folder
from converters.lowrank import factorize
from prehab_export.benchmark import bench
from prehab_export.calibration import CalibrationWarning, calibrate, few_tokens
from prehab_export.config import RunConfig
from prehab_export.export import DIGESTS, export_artifact, export_baseline
from prehab_export.parity import digests_of
from prehab_export.prehabilitation import prehab
from prehab_export.progress import bar, say
from prehab_export.rehabilitation import rehab
from prehab_export.report import write_report
from prehab_export.session import Session, bench_config
from prehab_export.statistics import Statistics, load_statistics, save_statistics
from prehab_export.training import frozen_copy
from prehab_export.truncation import Truncation, truncate
from prehab_export.verification import publish_artifact, verify_in_fresh_process
from prehab_export.workspace import write_json

STATISTICS = "statistics.safetensors"


@dataclass(frozen=True)
class Stage:
    """What a stage does, which options its output depends on, which stages it reads, and when it is wanted."""

    name: str
    work: Callable[[Session, Path], None]
    options: Callable[[RunConfig], Mapping[str, Any]]
    parents: tuple[str, ...] = ()
    wanted: Callable[[RunConfig], bool] = lambda _config: True


def _merge(session: Session, folder: Path) -> None:
    model = merge_dense_adapter(session.load_given(), Path(str(session.config.adapter)))
    save_folder(model, folder / "model", session.fresh_processor())


def _calibrate(session: Session, folder: Path) -> None:
    model = session.load_dense()
    layers = session.layers(model)
    statistics = _statistics(session, model, layers)
    save_statistics(statistics, folder / STATISTICS)
    if (warning := few_tokens(statistics)) is not None:
        say(f"  [yellow]warning: {warning}")
    facts = {
        "samples": len(session.calibration),
        "tokens": {group: moment.tokens for group, moment in statistics.inputs.items()},
        "layers": len(layers),
        "input_groups": len(statistics.inputs),
        "gradient_units": statistics.units,
        "warnings": [] if warning is None else [warning],
    }
    write_json(folder / "calibrate.json", facts)


def _statistics(session: Session, model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> Statistics:
    options = session.config
    with bar("calibrate", len(session.calibration)) as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # said once, by the stage
        return calibrate(
            model,
            session.calibration.batches(options.data.batch_size),
            session.task,
            layers,
            gradients=options.needs_gradients,
            labels=options.calibrate.labels,
            seed=options.seed,
            progress=advance,
        )


def _prehab(session: Session, folder: Path) -> None:
    options, task = session.config, session.task
    model = session.load_dense()
    layers = session.layers(model)
    statistics = load_statistics(session.workspace.folder("calibrate") / STATISTICS)
    without = _truncated_loss(session, model, statistics) if options.prehab.guard else None

    def dense_metric(candidate: nn.Module) -> dict[str, float]:
        metrics = session.metrics(candidate, session.held_out, "dense model on held-out samples")
        return {f"dense_{metrics.metric}": metrics.value, "dense_loss": metrics.loss}

    with bar("prehab", options.prehab.train.steps) as advance:
        history = prehab(
            model,
            task,
            session.training,
            layers,
            statistics,
            options.prehab,
            options.truncate,
            fisher_labels=options.calibrate.labels,
            seed=options.seed,
            evaluate=dense_metric,
            progress=lambda row: advance(1, note=f"loss {row['task_loss']:.3f}, surrogate {row['surrogate']:.3f}"),
        )
    fresh = _statistics(session, model, layers)
    held_out = _truncated_loss(session, model, fresh) if options.prehab.guard else None
    kept = held_out is None or without is None or held_out < without
    if kept:
        save_folder(model, folder / "model", session.fresh_processor())
        save_statistics(fresh, folder / STATISTICS)
    losses = {"truncated_loss_without": without, "truncated_loss_with": held_out}
    write_json(folder / "prehab.json", {"kept": kept, **losses, "history": history})


def _truncated_loss(session: Session, model: PreTrainedModel, statistics: Statistics) -> float:
    """Held-out loss of the model as it would be truncated now; the model itself is left alone."""
    candidate = frozen_copy(model)
    factorize(candidate, _truncated(session, candidate, statistics).factors)
    return session.held_out_loss(candidate)


def _truncated(session: Session, model: nn.Module, statistics: Statistics) -> Truncation:
    layers = session.layers(model)
    with bar("truncate", len(layers)) as advance:
        return truncate(layers, statistics, session.config.truncate, progress=advance)


def _truncate(session: Session, folder: Path) -> None:
    model, statistics = session.load_prepared()
    total = sum(parameter.numel() for parameter in model.parameters())
    truncation = _truncated(session, model, statistics)
    _say_what_was_removed(session, truncation)
    factorize(model, truncation.factors)
    after = sum(parameter.numel() for parameter in model.parameters())
    width = next(model.parameters()).element_size()
    write_json(folder / DIGESTS, digests_of(model))
    save_folder(model, folder / "model", session.fresh_processor())
    sizes = {
        "total_parameters_before": total,
        "total_parameters_after": after,
        "weight_bytes_before": total * width,
        "weight_bytes_after": after * width,
    }
    write_json(folder / "truncate.json", truncation.summary() | sizes)


def _say_what_was_removed(session: Session, truncation: Truncation) -> None:
    removed, asked = truncation.summary()["targeted_share_removed"], session.config.truncate.ratio
    if abs(removed - asked) > 0.03:
        say(f"  [yellow]warning: {removed:.0%} removed where {asked:.0%} was asked: ranks are whole and have a floor")


def _rehab(session: Session, folder: Path) -> None:
    options = session.config.rehab
    model = from_pretrained(
        session.workspace.folder("truncate") / "model", trust_remote_code=session.config.trust_remote_code
    )
    teacher = frozen_copy(session.load_dense()) if options.train.distill else None
    with bar("rehab", options.train.steps) as advance:
        result = rehab(
            model,
            session.task,
            session.training,
            options,
            held_out_loss=session.held_out_loss,
            seed=session.config.seed,
            teacher=teacher,
            progress=lambda row: advance(1, note=f"loss {row['task_loss']:.3f}"),
        )
    write_json(folder / DIGESTS, digests_of(model))
    save_folder(model, folder / "model", session.fresh_processor())
    write_json(folder / "rehab.json", asdict(result))


def _bench(session: Session, folder: Path) -> None:
    root = session.workspace
    models = {
        "dense": root.folder("baseline") / "onnx" / "model.onnx",
        "compressed": root.folder("artifact") / "onnx" / "model.onnx",
    }
    vocabulary = getattr(session.model_config.get_text_config(), "vocab_size", None)
    write_json(folder / "bench.json", bench(models, bench_config(session), vocabulary))


def _needs_prehab(config: RunConfig) -> bool:
    return config.prehab.train.steps > 0


def _needs_rehab(config: RunConfig) -> bool:
    return config.rehab.train.steps > 0


STAGES = {
    stage.name: stage
    for stage in (
        Stage("merge", _merge, lambda c: {}, wanted=lambda c: c.adapter is not None),
        Stage("calibrate", _calibrate, lambda c: asdict(c.calibrate) | {"gradients": c.needs_gradients}, ("merge",)),
        Stage(
            "prehab",
            _prehab,
            lambda c: {"prehab": asdict(c.prehab), "truncate": asdict(c.truncate)},
            ("merge", "calibrate"),
            _needs_prehab,
        ),
        Stage("truncate", _truncate, lambda c: asdict(c.truncate), ("merge", "calibrate", "prehab")),
        Stage("rehab", _rehab, lambda c: asdict(c.rehab), ("merge", "truncate"), _needs_rehab),
        Stage("export", export_artifact, lambda c: {}, ("truncate", "rehab")),
        Stage("baseline", export_baseline, lambda c: {"eval_samples": c.data.eval_samples}, ("merge",)),
        Stage("verify", verify_in_fresh_process, lambda c: {}, ("export", "baseline")),
        Stage("artifact", publish_artifact, lambda c: {}, ("verify",)),
        Stage("bench", _bench, lambda c: asdict(c.bench), ("artifact", "baseline")),
        Stage("report", write_report, lambda c: {}, ("artifact", "bench")),
    )
}
