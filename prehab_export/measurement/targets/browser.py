"""A kit in a browser: served from here to a headless Chromium, or to any browser that a person opens.

The page runs the kit with onnxruntime-web and sends the results back. Pages are isolated (COOP and COEP), without which
a browser gives WASM one thread only. Nothing is fetched from elsewhere: onnxruntime-web lies on this machine.

A kit is the models themselves, so an address says who may have it: its path begins with a token, without which nothing
is served and nothing taken.
"""

import hmac
import json
import os
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from queue import Empty, Queue
from socket import AF_INET, gethostname
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import psutil

from converters.errors import InputError
from converters.publishing import published_folder
from prehab_export.measurement.targets.kit import Kit
from prehab_export.measurement.targets.results import Json, check_results
from prehab_export.system import (
    ParityError,
    TargetError,
    cache_folder,
    die_with_parent,
    environment,
    find_program,
    kill_process_tree,
    sha512_integrity,
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
WEB_VERSION = "1.30.0"
# Of the package as the registry has it (npm view onnxruntime-web@VERSION dist.integrity).
WEB_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
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
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY_ADDRESS = "0.0.0.0"


@dataclass
class Served:
    """A kit at an address, or at all addresses of this machine; ``messages`` are (what, text) pairs that pages send:
    progress, results, failed."""

    addresses: list[str]
    token: str
    messages: "Queue[tuple[str, str]]" = field(default_factory=Queue)

    @property
    def address(self) -> str:
        return self.addresses[0]


@contextmanager
def serve(kit: Kit, web: Path, host: str = "127.0.0.1", port: int = 0) -> Iterator[Served]:
    """Serve the kit, the page and onnxruntime-web; closed at the end.

    Args:
        web: the ``dist`` folder of onnxruntime-web.
    """
    served = Served([], secrets.token_urlsafe(16))
    page = Path(str(files("prehab_export.measurement.targets") / "page"))
    roots = {"kit": kit.folder, "ort": web, "": page}
    server = ThreadingHTTPServer((host, port), lambda *args: _Handler(*args, served=served, roots=roots))
    served.addresses = [f"http://{name}:{server.server_port}/{served.token}/" for name in _names_of(host)]
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _names_of(host: str) -> list[str]:
    """What a browser is told to go to."""
    if host in LOOPBACK:
        return ["localhost"]
    if host != ANY_ADDRESS:
        return [host]
    known = [entry.address for own in psutil.net_if_addrs().values() for entry in own if entry.family == AF_INET]
    return [address for address in known if not ip_address(address).is_loopback] or ["localhost"]


def _is_ours(host: str, addresses: list[str]) -> bool:
    """Whether a request's Host names this machine. Any other name is one that somebody has made to lead here, so that
    a page of theirs counts as ours (DNS rebinding); a bare address cannot be made to."""
    try:
        name, own = urlsplit(f"//{host}").hostname or "", gethostname().lower()
        known = {urlsplit(address).hostname for address in addresses} | {"localhost", own, f"{own}.local"}
        return name in known or bool(ip_address(name))
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    timeout = 60.0  # seconds without a byte, after which a connection is given up

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
        what, length = self._place(), self.headers.get("Content-Length", "")
        if what not in ("progress", "results", "failed") or not length.isdecimal() or int(length) > LARGEST_POST:
            self.send_error(403)
            return
        self.served.messages.put((what, self.rfile.read(int(length)).decode(errors="replace")))
        self._head(204, "text/plain", 0)

    def _place(self) -> str | None:
        """What stands behind the token; None where there is no such token, or the request is meant for another host."""
        try:
            _, given, place = unquote(urlsplit(self.path).path).split("/", 2)
        except ValueError:
            return None
        known = hmac.compare_digest(given.encode(), self.served.token.encode())
        return place if known and _is_ours(self.headers.get("Host", ""), self.served.addresses) else None

    def _file(self) -> Path | None:
        """The file that an address means, if it lies in one of the folders."""
        place = self._place()
        if place is None:
            return None
        first, _, rest = place.partition("/")
        root, name = (self.roots[first], rest) if first in ("kit", "ort") else (self.roots[""], place or "index.html")
        try:
            file = (root / name).resolve()
            return file if file.is_file() and root.resolve() in file.parents else None
        except (OSError, ValueError):  # a name that no file can have
            return None

    def _head(self, status: int, kind: str, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
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
    if not _can_sandbox():
        say("the browser runs without its sandbox, which it refuses to root")
    merged: Json = {}
    with serve(kit, folder) as served:

        def visit(question: str) -> Json:
            address = f"{served.address}?auto=1&provider={provider}&{question}"
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
                    raise TargetError(
                        f"the browser ended with exit code {process.returncode}; where it cannot have its sandbox (in "
                        "some containers, or with user namespaces off), open the page yourself with --by-hand"
                    ) from None
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
            *([] if _can_sandbox() else ["--no-sandbox"]),
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
            env=environment(),
            preexec_fn=die_with_parent(),
        )
        try:
            yield process
        finally:
            kill_process_tree(process)


def _can_sandbox() -> bool:
    """Chromium on Linux has no sandbox for root, and does not start unless told that it may go without."""
    return not (sys.platform == "linux" and os.geteuid() == 0)


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


def find_browser(given: str | None) -> str:
    """Raises:
    InputError: no Chromium here.
    """
    names = (given,) if given else BROWSERS
    found = next((path for name in names if (path := find_program(name))), None)
    if found is None:
        raise InputError(
            f"there is no {given or 'Chromium or Chrome'} here; install one, name it with --browser, or open the page "
            "in any browser with --by-hand"
        )
    return found


def find_web(given: Path | None) -> Path:
    """The ``dist`` folder of onnxruntime-web: the given one, or one that npm puts into the cache once.

    Raises:
        InputError: it is not there, and npm is not there to get it, or gets something else.
    """
    if given is not None:
        if not (given / WEB_ENTRY).is_file():
            raise InputError(f"{given} holds no {WEB_ENTRY}; give the dist folder of onnxruntime-web")
        return given
    place = cache_folder() / f"onnxruntime-web-{WEB_VERSION}"
    if (place / WEB_ENTRY).is_file():
        return place
    npm = find_program("npm")
    if npm is None:
        raise InputError(
            "onnxruntime-web is not here, and there is no npm to get it; install npm, or give its dist folder with "
            "--ort-web"
        )
    with published_folder(place, replace=True) as dist, tempfile.TemporaryDirectory(dir=dist.parent) as own:
        archive = _packed(npm, Path(own))
        check_integrity(archive, WEB_SHA512)
        _unpack(archive, dist)
    return place


def _packed(npm: str, folder: Path) -> Path:
    """The package as the registry has it, unopened: npm runs none of its scripts, and reads no settings but the
    user's own."""
    package = f"onnxruntime-web@{WEB_VERSION}"
    done = subprocess.run(
        [npm, "pack", package, "--ignore-scripts", "--pack-destination", str(folder)],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    archives = list(folder.glob("*.tgz"))
    if done.returncode != 0 or len(archives) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise InputError(
            f"npm could not get {package}: {lines[0] if lines else 'no reason given'}; give its dist folder with "
            "--ort-web"
        )
    return archives[0]


def check_integrity(archive: Path, expected: str) -> None:
    """Raises:
    InputError: the archive is not the one whose SHA-512 (base64, as npm writes it) this program was made with.
    """
    found = sha512_integrity(archive)
    if not hmac.compare_digest(found, expected):
        raise InputError(
            f"onnxruntime-web {WEB_VERSION} came as something else than what this program was made with (sha512 "
            f"{found[:12]}…, not {expected[:12]}…): nothing of it was used; look at npm's registry setting, or give a "
            "dist folder that you trust with --ort-web"
        )


def _unpack(archive: Path, folder: Path) -> None:
    """The files of the package's ``dist``, which has no folders in it."""
    with tarfile.open(archive) as members:
        for member in members:
            where, _, name = member.name.rpartition("/")
            content = members.extractfile(member) if where == "package/dist" else None
            if content is not None:
                with content, (folder / name).open("wb") as file:
                    shutil.copyfileobj(content, file)
    if not (folder / WEB_ENTRY).is_file():
        raise InputError(f"onnxruntime-web {WEB_VERSION} has no {WEB_ENTRY}; give its dist folder with --ort-web")
