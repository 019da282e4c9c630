"""Comparison of several methods at several ratios, from one calibration and one decomposition per layer and objective.

Every row is published separately, so that a sweep that was killed or extended computes only the missing rows.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from converters.errors import InputError
from prehab_export.compression import (
    Calibrated,
    Decompositions,
    Factored,
    Folders,
    Samplesets,
    block_refiner,
    compress,
    decompose_layers,
    refine,
    sharing_copy,
)
from prehab_export.config import RunConfig
from prehab_export.pipeline.report.plots import plot_sweep
from prehab_export.pipeline.running import side_session, update_through
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.sweep_methods import METHODS, Method
from prehab_export.pipeline.workspace import stage_key
from prehab_export.system import bar, named, say, warn, write_json

Row = dict[str, Any]


def sweep(config: RunConfig, output: Path, methods: Sequence[str], ratios: Sequence[float]) -> Path:
    """Measure every method at every ratio on the evaluation split.

    Args:
        config: the options of the run. A sweep uses its model, data, calibration and refinement, but not its ratio and
            objective.
        output: the run's folder.
        methods: names in ``sweep_methods.METHODS``.
        ratios: shares of the selected parameters to remove.

    Returns:
        The folder with the table and the plot.

    Raises:
        InputError: the input is bad; this is found before any slow work.
    """
    selected = [METHODS[name] for name in dict.fromkeys(methods)]
    ratios = sorted(set(ratios))
    if any(method.refined for method in selected) and not config.refine.schedule.steps:
        raise InputError("the method 'refined' needs --refine-steps above 0; raise it or leave the method out")
    cuts = [method.at(ratio, config.cut) for method in selected for ratio in ratios]
    # The moments of the most demanding method serve all methods.
    sweep_config = replace(config, truncate=max(cuts, key=lambda cut: cut.needs_gradients))
    with side_session(sweep_config, output, config) as session:
        update_through(session, "calibrate")
        dense, *rows = _Rows(session).all(selected, ratios)
        with session.workspace.show("sweep") as folder:
            write_json(folder / "sweep.json", {"dense": dense, "rows": rows, "coverage": session.coverage.facts()})
            (folder / "sweep.md").write_text(_markdown(dense, rows), encoding="utf-8")
            plot_sweep(dense, rows, folder / "sweep.png")
    return session.workspace.root / "sweep"


class _Rows:
    """The rows of one sweep, read from the workspace if they exist there and computed otherwise."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.parent = session.identity("calibrate")
        self.model: PreTrainedModel | None = None
        self.decompositions: Decompositions | None = None
        self.keep: Folders | None = None

    def all(self, methods: Sequence[Method], ratios: Sequence[float]) -> list[Row]:
        """Return the dense model's row, then a row for every method and ratio."""
        evaluation = {"evaluation": self.session.data.evaluation_fingerprint}
        rows = [self._row("sweep-dense", evaluation, lambda: {"method": "dense", "ratio": 0.0} | self._dense())]
        for objective in dict.fromkeys(method.objective for method in methods):
            group = [method for method in methods if method.objective == objective]
            self.decompositions = None
            # Every ratio uses the same factors, except with drift correction.
            plain = any(not method.drift_correction for method in group)
            self.keep = self.session.folders if plain else None
            for method in group:
                for ratio in ratios:
                    options = evaluation | self._options(method, ratio)
                    name = f"sweep-{method.name}-{ratio:g}"
                    rows.append(self._row(name, options, partial(self._measure, method, ratio)))
        return rows

    def _row(self, name: str, options: dict[str, Any], compute_row: Callable[[], Row]) -> Row:
        workspace = self.session.workspace
        key = stage_key(name, options, [self.parent])
        if workspace.find(name, key) is None:
            with workspace.publish(name, key, options) as folder:
                write_json(folder / "row.json", compute_row())
        row = json.loads((workspace.result(name, key) / "row.json").read_text(encoding="utf-8"))
        say(f"  {name.removeprefix('sweep-')}: {row['metric']} {row['value']:.4f}")
        return row

    def _options(self, method: Method, ratio: float) -> dict[str, Any]:
        config = self.session.config
        refinement = asdict(config.refine) if method.refined else None
        return {"truncate": asdict(method.at(ratio, config.cut)), "refine": refinement}

    def _dense(self) -> Row:
        return asdict(self.session.metrics(self._model(), self.session.data.evaluation, "dense"))

    def _model(self) -> PreTrainedModel:
        if self.model is None:
            self.model = self.session.load_dense()
        return self.model

    def _measure(self, method: Method, ratio: float) -> Row:
        session, calibrated = self.session, self._calibrated()
        config = session.config
        cut = method.at(ratio, config.cut)
        if self.decompositions is None:
            progress = named(bar, f"decompose for {method.objective}")
            self.decompositions = decompose_layers(calibrated, cut, keep=self.keep, progress=progress)
        start = time.monotonic()
        samples = Samplesets(session.calibrated_samples, session.held_out, config.data.batch_size, session.folders)
        refines_blocks = method.refined and config.refine.block_steps > 0
        result = compress(
            calibrated,
            samples,
            cut,
            decomposed=self.decompositions,
            after_block=(
                block_refiner(config.refine, calibrated.statistics, seed=config.seed) if refines_blocks else None
            ),
            progress=bar,
        )
        for warning in result.warnings:
            warn(warning)
        candidate = result.truncation.apply(sharing_copy(calibrated.model))
        if method.refined:
            factored = Factored.of(candidate, session.task, calibrated.statistics)
            refine(factored, session.training, config.refine, teacher=calibrated.model, seed=config.seed, progress=bar)
        seconds = time.monotonic() - start
        metrics = asdict(session.metrics(candidate, session.data.evaluation, f"{method.name} {ratio:g}"))
        facts = {key: value for key, value in result.truncation.summary().items() if key != "layers"}
        return {"method": method.name, "ratio": ratio, **metrics, "seconds": seconds, **facts}

    def _calibrated(self) -> Calibrated:
        return Calibrated(self._model(), self.session.task, self.session.load_statistics("calibrate"))


def sweep_cells(dense: Row, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the heading and the body of a sweep's table: a row per method, a column per ratio."""
    ratios = sorted({row["ratio"] for row in rows})
    heading = [f"{dense['metric']}, dense {dense['value']:.4f}", *(f"{ratio:.0%} removed" for ratio in ratios)]
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        values = {row["ratio"]: row["value"] for row in rows if row["method"] == method}
        body.append([method, *(f"{values[ratio]:.4f}" for ratio in ratios)])
    return heading, body


def _markdown(dense: Row, rows: list[Row]) -> str:
    heading, body = sweep_cells(dense, rows)
    table = [heading, ["---"] * len(heading), *body]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in table)
