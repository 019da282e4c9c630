"""Measurement of a kit in a browser: a headless Chromium, or any browser that a person opens.

The page runs the kit with onnxruntime-web and sends the results back. It fetches nothing from the internet, because
this machine serves onnxruntime-web too.
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
from prehab_export.measurement.targets.page_server import KitServer, serve
from prehab_export.measurement.targets.process_output import Watch
from prehab_export.measurement.targets.results import Json, check_results
from prehab_export.measurement.targets.rounds import count_rounds, follow
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
    """Measure a kit in a headless Chromium and return the results.

    Each number of threads has a fresh browser, because a page cannot change it. So does the heap of each model.

    Args:
        threads: the numbers of threads to measure with.
        browser: command of the browser; detected when None.
        web: ``dist`` folder of onnxruntime-web; fetched with npm when None.
        provider: execution provider of onnxruntime-web, ``wasm`` or ``webgpu``.
        timeout_s: maximum seconds between two messages of the page.

    Raises:
        InputError: this machine has no browser or no onnxruntime-web.
        ParityError: the answers of a model differ from the recorded ones.
        TargetError: the browser exits, takes too long, or the page fails.
    """
    command, folder = find_browser(browser), find_web(web)
    if not can_sandbox():
        _warn_without_sandbox()
    merged: Json = {}
    steps = count_rounds(kit, threads) + len(kit.facts["models"])
    with serve(kit, folder) as server, progress("measure in a browser", steps) as advance:

        def visit(query: str) -> Json:
            address = f"{server.address}?auto=1&provider={provider}&{query}"
            results = _run_page(command, address, server, follow(advance), timeout_s)
            check_results(results, "what the page sent", kit.digest)
            return results

        rounds = kit.facts["protocol"]["rounds"]
        for count in threads:
            results = visit(f"threads={count}&rounds={rounds}")
            merged = results if not merged else _merge_results(merged, results)
        for model in kit.facts["models"]:
            with step(advance, f"{model['name']}: its heap"):
                heap = visit(f"threads={threads[0]}&rounds=1&only={model['slug']}")["heap_mb"]
            for row in merged["cases"]:
                if row["model"] == model["name"]:
                    row["heap_mb"] = heap
    return merged


@cache
def _warn_without_sandbox() -> None:
    """Warn that the browser has no sandbox. The cache keeps this to one warning per process."""
    say("  the browser runs without its sandbox, because it does not offer one to root")


def _merge_results(first: Json, second: Json) -> Json:
    lists = ("parity", "cases", "drift", "comparison")
    return first | {key: [*first[key], *second[key]] for key in lists}


def _run_page(command: str, address: str, server: KitServer, watch: Watch, timeout_s: float) -> Json:
    """Open the page in a headless browser and return the results that it sends."""
    with headless_chromium(command, address) as process:
        waited = 0.0
        while True:
            try:
                what, text = server.messages.get(timeout=0.5)
            except Empty:
                waited += 0.5
                if process.poll() is not None:
                    raise TargetError(
                        f"the browser ended with exit code {process.returncode}; if its sandbox is not available (in "
                        "some containers, or without user namespaces), open the page yourself with --by-hand"
                    ) from None
                if waited > timeout_s:
                    raise TargetError(f"the page sent nothing for {timeout_s:.0f} s") from None
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
    on_open: Callable[[list[str]], None],
    on_results: Callable[[Json], None],
) -> None:
    """Serve the page for any browser, until interrupted.

    Args:
        web: ``dist`` folder of onnxruntime-web; fetched with npm when None.
        on_open: called with the addresses of the page once it is served.
        on_results: called with the results of each measurement.

    Raises:
        InputError: this machine has no onnxruntime-web, the address is not available, or a page sends something else
            than results.
    """
    folder = find_web(web)
    try:
        with serve(kit, folder, host, port) as server, suppress(KeyboardInterrupt):
            on_open(server.addresses)
            while True:
                what, text = server.messages.get()
                if what == "results":
                    results = json.loads(text)
                    check_results(results, "what the page sent")
                    on_results(results)
    except OSError as error:
        raise InputError(
            f"the page cannot be served at {host}:{port}: {error.strerror}; give another --port"
        ) from error
