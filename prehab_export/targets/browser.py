"""A kit in a browser: served from here to a headless Chromium, or to any browser that a person opens.

The page runs the kit with onnxruntime-web and sends the results back. Pages are isolated (COOP and COEP), without which
a browser gives WASM one thread only. Nothing is fetched from elsewhere: onnxruntime-web lies on this machine.
"""

import json
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from converters.errors import InputError
from prehab_export.children import dies_with_us, end_with_all_of_it
from prehab_export.errors import ParityError, TargetError
from prehab_export.targets.kit import Kit
from prehab_export.targets.results import Json, check_results

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
WEB_VERSION = "1.30.0"
WEB_ENTRY = "ort.all.min.mjs"
TIMEOUT_S = 900.0
MIME = {
    ".html": "text/html; charset=utf-8",
    ".mjs": "text/javascript",
    ".js": "text/javascript",
    ".wasm": "application/wasm",
    ".json": "application/json",
}
# Far more than results take; a page that sends more is not ours.
LARGEST_POST = 50_000_000


@dataclass
class Served:
    """A kit at an address; ``messages`` are (what, text) pairs that pages send: progress, results, failed."""

    address: str
    token: str
    messages: "Queue[tuple[str, str]]" = field(default_factory=Queue)


@contextmanager
def serve(kit: Kit, web: Path, host: str = "127.0.0.1", port: int = 0) -> Iterator[Served]:
    """Serve the kit, the page and onnxruntime-web; closed at the end.

    Args:
        web: the ``dist`` folder of onnxruntime-web.
    """
    served = Served("", secrets.token_urlsafe(16))
    page = Path(str(files("prehab_export.targets") / "page"))
    roots = {"kit": kit.folder, "ort": web, "": page}
    server = ThreadingHTTPServer((host, port), lambda *args: _Handler(*args, served=served, roots=roots))
    served.address = f"http://{'localhost' if host == '127.0.0.1' else host}:{server.server_port}/"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, *args: Any, served: Served, roots: dict[str, Path]) -> None:
        self.served, self.roots = served, roots
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not news."""

    def do_GET(self) -> None:
        file = self._file()
        if file is None:
            self.send_error(404)
            return
        self._head(200, MIME.get(file.suffix, "application/octet-stream"), file.stat().st_size)
        with file.open("rb") as source, suppress(BrokenPipeError, ConnectionResetError):
            shutil.copyfileobj(source, self.wfile)

    def do_POST(self) -> None:
        address, length = urlsplit(self.path), int(self.headers.get("Content-Length", 0))
        what, given = address.path.strip("/"), parse_qs(address.query).get("token", [""])[0]
        known = what in ("progress", "results", "failed") and secrets.compare_digest(given, self.served.token)
        if not known or not 0 <= length <= LARGEST_POST:
            self.send_error(403)
            return
        self.served.messages.put((what, self.rfile.read(length).decode(errors="replace")))
        self._head(204, "text/plain", 0)

    def _file(self) -> Path | None:
        """The file that an address means, if it lies in one of the folders."""
        first, _, rest = unquote(urlsplit(self.path).path).strip("/").partition("/")
        root, name = (self.roots[first], rest) if first in ("kit", "ort") else (self.roots[""], first or "index.html")
        file = (root / name).resolve()
        return file if file.is_file() and root.resolve() in file.parents else None

    def _head(self, status: int, kind: str, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()


def measure_in_browser(
    kit: Kit,
    threads: tuple[int, ...],
    *,
    browser: str | None = None,
    web: Path | None = None,
    provider: str = "wasm",
    progress: Callable[[str], None] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Json:
    """The results of the kit in a headless Chromium: a fresh browser for each number of threads (a page cannot change
    it), and one for each model's heap.

    Raises:
        InputError: no browser or no onnxruntime-web here.
        ParityError: a model gives other answers there.
        TargetError: the browser dies, takes too long, or the page fails.
    """
    say = progress or (lambda _: None)
    command, folder = find_browser(browser), find_web(web)
    merged: Json = {}
    with serve(kit, folder) as served:

        def visit(question: str) -> Json:
            address = f"{served.address}?auto={served.token}&provider={provider}&{question}"
            results = _visited(command, address, served, say, timeout_s)
            check_results(results, "what the page sent", kit.digest)
            return results

        rounds = kit.facts["protocol"]["rounds"]
        for count in threads:
            results = visit(f"threads={count}&rounds={rounds}")
            merged = results if not merged else _joined(merged, results)
        for model in kit.facts["models"]:
            heap = visit(f"threads={threads[0]}&rounds=1&only={model['slug']}")["heap_mb"]
            for row in merged["cases"]:
                if row["model"] == model["name"]:
                    row["heap_mb"] = heap
    return merged


def _joined(first: Json, second: Json) -> Json:
    lists = ("parity", "cases", "drift", "comparison")
    return first | {key: [*first[key], *second[key]] for key in lists}


def _visited(command: str, address: str, served: Served, say: Callable[[str], None], timeout_s: float) -> Json:
    """What the page at ``address`` sends in the end."""
    with _chromium(command, address) as process:
        waited = 0.0
        while True:
            try:
                what, text = served.messages.get(timeout=0.5)
            except Empty:
                waited += 0.5
                if process.poll() is not None:
                    raise TargetError(f"the browser ended with exit code {process.returncode}") from None
                if waited > timeout_s:
                    raise TargetError(f"the page said nothing for {timeout_s:.0f} s") from None
                continue
            waited = 0.0
            if what == "progress":
                say(text)
            elif what == "failed":
                raise ParityError(text) if "is off by" in text else TargetError(f"the page failed: {text}")
            else:
                return json.loads(text)


@contextmanager
def _chromium(command: str, address: str) -> Iterator[subprocess.Popen]:
    """A headless browser in a group of its own, with a profile of its own; all of it is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="prehab-export-browser-", ignore_cleanup_errors=True) as profile:
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-background-networking",
            "--no-first-run",
            "--enable-blink-features=ForceEagerMeasureMemory",
            "--enable-unsafe-webgpu",
            f"--user-data-dir={profile}",
        ]
        process = subprocess.Popen(
            [command, *arguments, address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=dies_with_us(),
        )
        try:
            yield process
        finally:
            end_with_all_of_it(process)


def serve_by_hand(
    kit: Kit, web: Path | None, host: str, port: int, opened: Callable[[str], None], results: Callable[[Json], None]
) -> None:
    """Serve the page until interrupted; ``opened`` is given its address, ``results`` what each visit sends.

    Raises:
        InputError: no onnxruntime-web here, or the address is taken.
    """
    folder = find_web(web)
    try:
        with serve(kit, folder, host, port) as served, suppress(KeyboardInterrupt):
            opened(f"{served.address}?token={served.token}")
            while True:
                what, text = served.messages.get()
                if what == "results":
                    found = json.loads(text)
                    check_results(found, "what the page sent")
                    results(found)
    except OSError as error:
        raise InputError(f"{host}:{port} cannot be served at: {error.strerror}; give another --port") from error


def find_browser(given: str | None) -> str:
    """Raises:
    InputError: no Chromium here.
    """
    names = (given,) if given else BROWSERS
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise InputError(
            f"there is no {given or 'Chromium or Chrome'} here; install one, name it with --browser, or open the page "
            "in any browser with --by-hand"
        )
    return found


def find_web(given: Path | None) -> Path:
    """The ``dist`` folder of onnxruntime-web: the given one, or one that npm puts into the cache once.

    Raises:
        InputError: it is not there, and there is no npm to get it.
    """
    if given is not None:
        if not (given / WEB_ENTRY).is_file():
            raise InputError(f"{given} holds no {WEB_ENTRY}; give the dist folder of onnxruntime-web")
        return given
    base = os.environ.get("XDG_CACHE_HOME")
    place = (Path(base) if base else Path.home() / ".cache") / "prehab-export" / f"onnxruntime-web-{WEB_VERSION}"
    folder = place / "node_modules" / "onnxruntime-web" / "dist"
    if (folder / WEB_ENTRY).is_file():
        return folder
    if shutil.which("npm") is None:
        raise InputError(
            "onnxruntime-web is not here, and there is no npm to get it; install npm, or give its dist folder with "
            "--ort-web"
        )
    place.mkdir(parents=True, exist_ok=True)
    package = f"onnxruntime-web@{WEB_VERSION}"
    done = subprocess.run(
        ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(place), package],
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode != 0 or not (folder / WEB_ENTRY).is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise InputError(
            f"npm could not install {package}: {lines[0] if lines else 'no reason given'}; give its dist folder with "
            "--ort-web"
        )
    return folder
