"""``bench --target``: the graphs of a run, measured somewhere else, and the results kept with the run."""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from converters.errors import InputError
from prehab_export.config import RunConfig, Target
from prehab_export.measurement import (
    LOOPBACK,
    Json,
    Kit,
    find_browser,
    find_web,
    limits_of,
    make_kit,
    matrix,
    measure_in_browser,
    measure_locally,
    measure_remotely,
    read_results,
    serve_by_hand,
    shell_of,
)
from prehab_export.pipeline.checks import bench_config
from prehab_export.pipeline.running import bring_up_to_date, opened, through
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.stages.quantize import graph_hashes, graphs_of
from prehab_export.pipeline.target_results import FOLDER, remember_kit, results_of
from prehab_export.pipeline.workspace import KITS
from prehab_export.system import bar, say, warn, write_json


def bench_on_target(config: RunConfig, output: Path, target: Target) -> Path:
    """Bring the run up to the point where it could be measured, and measure it there; returns the file of results, or
    the folder of the kit.

    Raises:
        InputError: bad input.
        TargetError: the place cannot be reached, lacks something, or is lost on the way.
        ParityError: a model gives other answers there.
    """
    # What cannot be kept to or reached is found out before anything slow.
    limits_of(target)
    if target.name.startswith(("ssh://", "adb")):
        with shell_of(target) as shell:
            shell.run("true")
    elif target.name == "browser":
        target = replace(target, web=find_web(target.web))
        if not target.by_hand:
            find_browser(target.browser)
    stages = through("bench")[:-1]
    with opened(config, output, stages) as session:
        bring_up_to_date(session, stages[-1])
        if target.name.startswith("kit:"):
            folder = Path(target.name.removeprefix("kit:"))
            return _kit(session, folder, target).folder
        with tempfile.TemporaryDirectory(dir=session.workspace.root, prefix=KITS.rstrip("*")) as own:
            kit = _kit(session, Path(own, "kit"), target)
            if target.by_hand:
                return _by_hand(session, kit, target)
            results = _measured(kit, target, _thread_counts(session))
        return keep_results(session, results, _file_name(target.name))


def keep_results(session: Session, results: Json, name: str) -> Path:
    """Put results with the run, and into its report if there is one."""
    folder = session.workspace.root / FOLDER
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.json"
    write_json(file, results)
    if session.workspace.has("artifact") and name not in results_of(session.workspace.root, graph_hashes(session)):
        warn(f"{name} was measured with a kit of other options; the report will have it when they are back")
    if session.workspace.has("report"):
        bring_up_to_date(session, "report")
    return file


def read_back(config: RunConfig, output: Path, results: Sequence[Path]) -> None:
    """Take in what was measured by hand with a kit of this run.

    Raises:
        InputError: not a file of results.
    """
    read = {path: read_results(path) for path in results}
    with opened(config, output) as session:
        for path, values in read.items():
            keep_results(session, values, _file_name(path.stem))


def _kit(session: Session, folder: Path, target: Target) -> Kit:
    kit = make_kit(graphs_of(session), folder, bench_config(session), target.cooldown_s)
    remember_kit(session.workspace.root, kit.digest, graph_hashes(session))
    return kit


def _by_hand(session: Session, kit: Kit, target: Target) -> Path:
    """Keeps what comes in, under the name of this target; returns the file."""

    def keep(results: Json) -> None:
        say(f"results came in; they are in {keep_results(session, results, 'browser-by-hand')}")

    def opened_at(addresses: list[str]) -> None:
        say(f"open {' or '.join(addresses)} in a browser and press Start; Ctrl-C ends this")
        if target.host not in LOOPBACK:
            say("whoever has that address can take the models; hand it on to nobody else")

    serve_by_hand(kit, target.web, target.host, target.port, opened_at, keep)
    file = session.workspace.root / FOLDER / "browser-by-hand.json"
    if not file.is_file():
        raise InputError("nobody measured anything before the page was closed")
    return file


def _thread_counts(session: Session) -> tuple[int, ...]:
    config = bench_config(session)
    return config.thread_counts or (config.threads,)


def _measured(kit: Kit, target: Target, threads: tuple[int, ...]) -> Json:
    if target.name == "browser":
        return measure_in_browser(kit, threads, browser=target.browser, web=target.web, progress=bar)
    if target.name != "local":
        with shell_of(target) as shell:
            return measure_remotely(kit, shell, target.name.partition(":")[0], target.python, target.keep, bar)
    results = measure_locally(kit, limits_of(target), progress=bar)
    if target.matrix_memory_mb:
        results["matrix"] = matrix(kit, threads, target.matrix_memory_mb, bar)
    return results


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
