"""A kit in a browser: in a headless Chromium, or in any browser that a person opens.

The page runs the kit with onnxruntime-web and sends the results back. Nothing is fetched from elsewhere:
onnxruntime-web lies on this machine.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from queue import Empty

from converters.errors import InputError
from prehab_export.measurement.targets.chromium import can_sandbox, find_browser, headless_chromium
from prehab_export.measurement.targets.kit import Kit
from prehab_export.measurement.targets.page_server import Served, serve
from prehab_export.measurement.targets.results import Json, check_results
from prehab_export.measurement.targets.rounds import follow, rounds_of
from prehab_export.measurement.targets.watched import Watch
from prehab_export.measurement.targets.web_runtime import find_web
from prehab_export.system import ParityError, Progress, TargetError, say, silent, step

TIMEOUT_S = 900.0


def measure_in_browser(
    kit: Kit,
    threads: tuple[int, ...],
    *,
    browser: str | None = None,
    web: Path | None = None,
    provider: str = "wasm",
    progress: Progress = silent,
    timeout_s: float = TIMEOUT_S,
) -> Json:
    """The results of the kit in a headless Chromium: a fresh browser for each number of threads (a page cannot change
    it), and one for each model's heap.

    Raises:
        InputError: no browser or no onnxruntime-web here.
        ParityError: a model gives other answers there.
        TargetError: the browser dies, takes too long, or the page fails.
    """
    command, folder = find_browser(browser), find_web(web)
    if not can_sandbox():
        _tell_of_no_sandbox()
    merged: Json = {}
    steps = rounds_of(kit, threads) + len(kit.facts["models"])
    with serve(kit, folder) as served, progress("measure in a browser", steps) as advance:

        def visit(question: str) -> Json:
            address = f"{served.address}?auto=1&provider={provider}&{question}"
            results = _visited(command, address, served, follow(advance), timeout_s)
            check_results(results, "what the page sent", kit.digest)
            return results

        rounds = kit.facts["protocol"]["rounds"]
        for count in threads:
            results = visit(f"threads={count}&rounds={rounds}")
            merged = results if not merged else _joined(merged, results)
        for model in kit.facts["models"]:
            with step(advance, f"{model['name']}: its heap"):
                heap = visit(f"threads={threads[0]}&rounds=1&only={model['slug']}")["heap_mb"]
            for row in merged["cases"]:
                if row["model"] == model["name"]:
                    row["heap_mb"] = heap
    return merged


@cache
def _tell_of_no_sandbox() -> None:
    """Once is enough."""
    say("  the browser runs without its sandbox, which it refuses to root")


def _joined(first: Json, second: Json) -> Json:
    lists = ("parity", "cases", "drift", "comparison")
    return first | {key: [*first[key], *second[key]] for key in lists}


def _visited(command: str, address: str, served: Served, watch: Watch, timeout_s: float) -> Json:
    """What the page at ``address`` sends in the end."""
    with headless_chromium(command, address) as process:
        waited = 0.0
        while True:
            try:
                what, text = served.messages.get(timeout=0.5)
            except Empty:
                waited += 0.5
                if process.poll() is not None:
                    raise TargetError(
                        f"the browser ended with exit code {process.returncode}; where it cannot have its sandbox (in "
                        "some containers, or with user namespaces off), open the page yourself with --by-hand"
                    ) from None
                if waited > timeout_s:
                    raise TargetError(f"the page said nothing for {timeout_s:.0f} s") from None
                continue
            waited = 0.0
            if what == "progress":
                watch(text)
            elif what == "failed":
                raise ParityError(text) if "is off by" in text else TargetError(f"the page failed: {text}")
            else:
                return json.loads(text)


def serve_by_hand(
    kit: Kit,
    web: Path | None,
    host: str,
    port: int,
    opened: Callable[[list[str]], None],
    results: Callable[[Json], None],
) -> None:
    """Serve the page until interrupted; ``opened`` is given its addresses, ``results`` what each visit sends.

    Raises:
        InputError: no onnxruntime-web here, or the address is taken.
    """
    folder = find_web(web)
    try:
        with serve(kit, folder, host, port) as served, suppress(KeyboardInterrupt):
            opened(served.addresses)
            while True:
                what, text = served.messages.get()
                if what == "results":
                    found = json.loads(text)
                    check_results(found, "what the page sent")
                    results(found)
    except OSError as error:
        raise InputError(f"{host}:{port} cannot be served at: {error.strerror}; give another --port") from error
