"""``bench --target``: measure a run's graphs on a target and store the results with the run."""

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
from prehab_export.pipeline.running import run_session, stages_through, update_through
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.stages.quantize import graph_hashes, run_graphs
from prehab_export.pipeline.target_results import FOLDER, matching_target_results, record_kit
from prehab_export.pipeline.workspace import KITS
from prehab_export.system import bar, say, warn, write_json


def bench_on_target(config: RunConfig, output: Path, target: Target) -> Path:
    """Bring the run up to date through the stages before ``bench``, and measure its graphs on the target.

    Returns:
        The file of results, or the kit's folder for a ``kit:`` target.

    Raises:
        InputError: the input is bad.
        TargetError: the target cannot be reached, lacks something, or is lost during the measurement.
        ParityError: a graph gives different answers on the target.
    """
    # Find bad limits and unreachable targets before any slow work.
    limits_of(target)
    if target.name.startswith(("ssh://", "adb")):
        with shell_of(target) as shell:
            shell.run("true")
    elif target.name == "browser":
        target = replace(target, web=find_web(target.web))
        if not target.by_hand:
            find_browser(target.browser)
    stages = stages_through("bench")[:-1]
    with run_session(config, output, stages) as session:
        update_through(session, stages[-1])
        if target.name.startswith("kit:"):
            folder = Path(target.name.removeprefix("kit:"))
            return _make_kit(session, folder, target).folder
        with tempfile.TemporaryDirectory(dir=session.workspace.root, prefix=KITS.rstrip("*")) as temporary:
            kit = _make_kit(session, Path(temporary, "kit"), target)
            if target.by_hand:
                return _serve_by_hand(session, kit, target)
            results = _measure(kit, target, _thread_counts(session))
        return store_results(session, results, _file_name(target.name))


def store_results(session: Session, results: Json, name: str) -> Path:
    """Store a target's results in the run's folder, and update the run's report if there is one.

    Returns:
        The file of results.
    """
    folder = session.workspace.root / FOLDER
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.json"
    write_json(file, results)
    root = session.workspace.root
    if session.workspace.has("artifact") and name not in matching_target_results(root, graph_hashes(session)):
        warn(f"{name} was measured with a kit of other options; the report shows it only under those options")
    if session.workspace.has("report"):
        update_through(session, "report")
    return file


def import_results(config: RunConfig, output: Path, results: Sequence[Path]) -> None:
    """Store results that were measured by hand with a kit of this run.

    Args:
        config: the run's options.
        output: the run's folder.
        results: files of results.

    Raises:
        InputError: a file does not hold results.
    """
    results_by_path = {path: read_results(path) for path in results}
    with run_session(config, output) as session:
        for path, values in results_by_path.items():
            store_results(session, values, _file_name(path.stem))


def _make_kit(session: Session, folder: Path, target: Target) -> Kit:
    has_baseline = session.dense_graph is not None
    kit = make_kit(run_graphs(session), folder, bench_config(session), target.cooldown_s, has_baseline)
    record_kit(session.workspace.root, kit.digest, graph_hashes(session))
    return kit


def _serve_by_hand(session: Session, kit: Kit, target: Target) -> Path:
    """Serve the kit to browsers and store all results that they send; return the file of results."""

    def on_results(results: Json) -> None:
        say(f"results arrived; they are in {store_results(session, results, 'browser-by-hand')}")

    def on_start(addresses: list[str]) -> None:
        say(f"open {' or '.join(addresses)} in a browser and press Start; Ctrl-C stops the server")
        if target.host not in LOOPBACK:
            say("anyone with that address can download the models; do not share it")

    serve_by_hand(kit, target.web, target.host, target.port, on_start, on_results)
    file = session.workspace.root / FOLDER / "browser-by-hand.json"
    if not file.is_file():
        raise InputError("nobody measured anything before the page was closed")
    return file


def _thread_counts(session: Session) -> tuple[int, ...]:
    config = bench_config(session)
    return config.thread_counts or (config.threads,)


def _measure(kit: Kit, target: Target, threads: tuple[int, ...]) -> Json:
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
