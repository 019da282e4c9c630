"""The page that runs a kit, served with the kit and onnxruntime-web.

The page is isolated (COOP and COEP), without which a browser gives WASM one thread only. A kit is the models
themselves, so an address says who may have it: its path begins with a token, without which nothing is served and
nothing taken.
"""

import hmac
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from queue import Queue
from socket import AF_INET, gethostname
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import psutil

from prehab_export.measurement.targets.kit import Kit

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
