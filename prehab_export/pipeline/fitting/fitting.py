"""The fit: the most accurate model within a budget on the device where it will run, or the proof that none was found.

The target is used twice: once for the survey (``surveying``), from which everything is predicted (``search``), and once
to measure the finalists (``finals``). Whatever takes long is published by itself, so that a fit that was killed, or is
asked again with another budget, computes only what is missing.
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prehab_export.config import PARAMETERS, Budget, RunConfig
from prehab_export.pipeline.fitting.finals import Finals, measure_finalists, plan_of, unsteady
from prehab_export.pipeline.fitting.models import FitModels
from prehab_export.pipeline.fitting.outcome import Outcome
from prehab_export.pipeline.fitting.report import write_fit
from prehab_export.pipeline.fitting.request import FitRequest
from prehab_export.pipeline.fitting.search import FLOAT32, Candidate, Search, chosen, corrected, distinct, finalists
from prehab_export.pipeline.fitting.surveying import Survey, survey_target
from prehab_export.pipeline.fitting.target import check_target
from prehab_export.pipeline.running import side_session, update_stages
from prehab_export.pipeline.session import Session
from prehab_export.system import BudgetError, bar

# How many candidates are made and measured.
FINALISTS = 3


def fit(config: RunConfig, output: Path, request: FitRequest) -> Path:
    """Find the most accurate model within the budget; returns the folder with table, plot and model.

    Args:
        config: the model, data and calibration; ``quantize`` are the kinds of quantisation that may be used.

    Raises:
        InputError: bad input or a target that cannot be reached, found before anything slow.
        BudgetError: nothing was found within the budget; the folder holds the figures.
    """
    given, cut = config, replace(config.truncate, budget=PARAMETERS, objective="fisher", allocation="loss")
    config = replace(config, truncate=cut)
    check_target(request.target, request.threads)
    with side_session(config, output, given, ["baseline"]) as session:
        session.workspace.hide("fit")  # of another budget perhaps: it must not stand there as this one's
        names = ["merge"] if config.adapter is not None else []
        update_stages(session, [*names, "calibrate", "baseline"])
        models = FitModels(session)
        told = survey_target(models, request)
        candidates, finals = _contest(models, request, told.search)
        outcome = Outcome(request.budget, candidates, finals, models.metrics(models.dense, FLOAT32))
        _publish(models, outcome, _facts(session, request, told, outcome))
    if outcome.best is None:
        raise BudgetError(f"{outcome.verdict()} Every figure is in {output / 'fit'}")
    return output / "fit"


def _contest(models: FitModels, request: FitRequest, search: Search) -> tuple[list[Candidate], Finals]:
    """Every candidate, and the finalists among them as measured; a second time where predictions were too low."""
    budget = request.budget
    candidates = search.all(budget, bar)
    few = finalists(candidates, budget, FINALISTS)
    finals = measure_finalists(models, request, few)
    nearer = _nearer(budget, few[0], finals)
    more = [] if nearer is None else [c for c in search.all(nearer, bar) if not nearer.misses(c.predicted)]
    if nearer is None or not more:
        return candidates, finals
    few = finalists(more, nearer, FINALISTS)
    return distinct([*candidates, *few]), finals.joined(measure_finalists(models, request, few))


def _nearer(budget: Budget, first: Candidate, finals: Finals) -> Budget | None:
    """What predictions have to keep to, where the ``first`` finalist was predicted to fit and no finalist does: now it
    is known by how much predictions were too low. None where that is not so."""
    foretold = not budget.misses(first.predicted)
    all_over = all(budget.distance(replace(own, drop=None)) for _, own in finals.tried)
    if chosen(finals.tried, budget) is None and foretold and all_over:
        return corrected(budget, finals.tried)
    return None


def _facts(session: Session, request: FitRequest, told: Survey, outcome: Outcome) -> dict[str, Any]:
    """The result as JSON types."""
    return {
        "model": Path(session.config.model).name,
        "task": session.config.task,
        "target": request.target.name.partition(":")[0],
        "device": outcome.finals.device,
        "budget": asdict(request.budget),
        "metric": asdict(outcome.dense),
        "coverage": session.coverage.facts(),
        "verdict": outcome.verdict(),
        "warning": unsteady(told.rows, outcome.finals.rows),
        "candidates": outcome.rows(told.drops),
        "measured": {"survey": told.rows, "finalists": outcome.finals.rows},
    }


def _publish(models: FitModels, outcome: Outcome, facts: dict[str, Any]) -> None:
    """The folder ``fit``: table, plot and figures, and the model that is recommended."""
    with models.session.workspace.show("fit") as folder:
        write_fit(facts, folder)
        if outcome.best is not None:
            models.write_folder(plan_of(outcome.best), outcome.best.setup.mode, folder / "model")
            for name, copy in (("fit.md", "README.md"), ("fit.png", "fit.png")):
                shutil.copy2(folder / name, folder / "model" / copy)
