"""The fit: the search for the most accurate model within a budget on the device where the model will run.

A fit visits the target twice. The first visit is the survey (``surveying``), from which the search predicts every
candidate (``search``). The second visit measures the finalists (``finals``). A fit caches its slow results one by one
(``result_cache``). After an interruption, or with another budget, it computes only the missing results.
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from converters.errors import InputError
from prehab_export.config import NEVER, PARAMETERS, Budget, RunConfig
from prehab_export.pipeline.fitting.finals import Finals, measure_finalists, plan_of, stability_warning
from prehab_export.pipeline.fitting.models import FitModels
from prehab_export.pipeline.fitting.outcome import Outcome
from prehab_export.pipeline.fitting.report import write_fit
from prehab_export.pipeline.fitting.request import FitRequest
from prehab_export.pipeline.fitting.search import (
    FLOAT32,
    Candidate,
    Search,
    correct_limits,
    select_best,
    select_finalists,
    unique,
)
from prehab_export.pipeline.fitting.surveying import Survey, survey_target
from prehab_export.pipeline.fitting.target import check_target
from prehab_export.pipeline.running import side_session, update_stages
from prehab_export.pipeline.session import Session
from prehab_export.system import BudgetError, bar

# Number of candidates to make and measure.
FINALISTS = 3


def fit(config: RunConfig, output: Path, request: FitRequest) -> Path:
    """Find the most accurate model within the budget, and return the folder with the table, the plot and the model.

    Args:
        config: the model, the data and the calibration. The search may use the kinds of quantisation in
            ``config.quantize``.
        output: the run's folder.

    Raises:
        InputError: the input is invalid. The check comes before any slow work.
        TargetError: the target cannot be reached or fails.
        BudgetError: no model was found within the budget. The folder holds the figures.
    """
    if config.dense_graph == NEVER:
        raise InputError(
            "a fit compares with the dense graph, which --dense-graph never leaves out; use always or auto"
        )
    original_config = config
    config = replace(
        config, truncate=replace(config.truncate, budget=PARAMETERS, objective="fisher", allocation="loss")
    )
    check_target(request.target, request.threads)
    with side_session(config, output, original_config, ["baseline"]) as session:
        if session.missing_dense_graph is not None:
            reason = session.missing_dense_graph.reason
            raise InputError(
                f"a fit compares with the dense graph, and there is none: {reason}; use --dense-graph always"
            )
        session.workspace.hide("fit")  # it may hold the result of another budget
        merge = ["merge"] if config.adapter is not None else []
        update_stages(session, [*merge, "calibrate", "baseline"])
        models = FitModels(session)
        survey = survey_target(models, request)
        candidates, finals = _measure_candidates(models, request, survey.search)
        outcome = Outcome(request.budget, candidates, finals, models.metrics(models.dense, FLOAT32))
        _publish(models, outcome, _facts(session, request, survey, outcome))
    if outcome.best is None:
        raise BudgetError(f"{outcome.verdict()} Every figure is in {output / 'fit'}")
    return output / "fit"


def _measure_candidates(models: FitModels, request: FitRequest, search: Search) -> tuple[list[Candidate], Finals]:
    """Return all candidates and the measurements of the finalists.

    If the predictions were too low, measure a second set of finalists under corrected limits.
    """
    budget = request.budget
    candidates = search.candidates(budget, bar)
    selected = select_finalists(candidates, budget, FINALISTS)
    finals = measure_finalists(models, request, selected)
    if not _needs_correction(budget, selected[0], finals):
        return candidates, finals
    corrected = correct_limits(budget, finals.measurements)
    fitting = [c for c in search.candidates(corrected, bar) if not corrected.misses(c.predicted)]
    if not fitting:
        return candidates, finals
    selected = select_finalists(fitting, corrected, FINALISTS)
    return unique([*candidates, *selected]), finals.merge(measure_finalists(models, request, selected))


def _needs_correction(budget: Budget, first: Candidate, finals: Finals) -> bool:
    """Return whether the first finalist was predicted to be within the budget, but every finalist exceeds the limits
    on time, memory or size. The finals then show by how much the predictions were too low."""
    all_exceed = all(budget.distance(replace(measured, drop=None)) for _, measured in finals.measurements)
    return select_best(finals.measurements, budget) is None and not budget.misses(first.predicted) and all_exceed


def _facts(session: Session, request: FitRequest, survey: Survey, outcome: Outcome) -> dict[str, Any]:
    """Return the result as JSON types."""
    return {
        "model": Path(session.config.model).name,
        "task": session.config.task,
        "target": request.target.name.partition(":")[0],
        "device": outcome.finals.device,
        "budget": asdict(request.budget),
        "metric": asdict(outcome.dense),
        "coverage": session.coverage.facts(),
        "verdict": outcome.verdict(),
        "warning": stability_warning(survey.rows, outcome.finals.rows),
        "candidates": outcome.rows(survey.drops),
        "measured": {"survey": survey.rows, "finalists": outcome.finals.rows},
    }


def _publish(models: FitModels, outcome: Outcome, facts: dict[str, Any]) -> None:
    """Publish the folder ``fit`` with the table, the plot, the figures and the recommended model."""
    with models.session.workspace.show("fit") as folder:
        write_fit(facts, folder)
        if outcome.best is not None:
            models.write_folder(plan_of(outcome.best), outcome.best.setup.mode, folder / "model")
            for name, copy in (("fit.md", "README.md"), ("fit.png", "fit.png")):
                shutil.copy2(folder / name, folder / "model" / copy)
