"""An HTTP server for the page that runs a kit, for the kit itself, and for onnxruntime-web.

The page is cross-origin isolated (COOP and COEP), because a browser allows WASM only one thread otherwise. A kit holds
the models, so access is restricted: the path of every address starts with a secret token, and requests without it are
rejected.
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
# Bytes. Results are far smaller, so a larger message does not come from our page.
LARGEST_POST = 50_000_000
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY_ADDRESS = "0.0.0.0"


@dataclass
class KitServer:
    """A running server.

    addresses: addresses of the page, token included.
    token: the secret part of the addresses.
    messages: (kind, text) pairs that pages send; the kind is ``progress``, ``results`` or ``failed``.
    """

    addresses: list[str]
    token: str
    messages: "Queue[tuple[str, str]]" = field(default_factory=Queue)

    @property
    def address(self) -> str:
        """The first address of the page."""
        return self.addresses[0]


@contextmanager
def serve(kit: Kit, web: Path, host: str = "127.0.0.1", port: int = 0) -> Iterator[KitServer]:
    """Serve the kit, the page and onnxruntime-web while the block runs.

    Args:
        web: ``dist`` folder of onnxruntime-web.
        host: address to listen at; ``0.0.0.0`` for all addresses of this machine.
        port: port to listen at; 0 for a free one.

    Raises:
        OSError: the address is not available.
    """
    kit_server = KitServer([], secrets.token_urlsafe(16))
    page = Path(str(files("prehab_export.measurement.targets") / "page"))
    roots = {"kit": kit.folder, "ort": web, "": page}
    server = ThreadingHTTPServer((host, port), lambda *args: _Handler(*args, kit_server=kit_server, roots=roots))
    kit_server.addresses = [
        f"http://{name}:{server.server_port}/{kit_server.token}/" for name in _reachable_names(host)
    ]
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield kit_server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _reachable_names(host: str) -> list[str]:
    """Return the host names by which a browser can reach a server that listens at ``host``."""
    if host in LOOPBACK:
        return ["localhost"]
    if host != ANY_ADDRESS:
        return [host]
    interfaces = psutil.net_if_addrs().values()
    addresses = [entry.address for entries in interfaces for entry in entries if entry.family == AF_INET]
    return [address for address in addresses if not ip_address(address).is_loopback] or ["localhost"]


def _names_this_machine(host: str, addresses: list[str]) -> bool:
    """Return whether the Host header of a request names this machine.

    This prevents DNS rebinding, in which a foreign page reaches this server under a name of its own. IP addresses are
    accepted, because they cannot be rebound.
    """
    try:
        name, machine = urlsplit(f"//{host}").hostname or "", gethostname().lower()
        known = {urlsplit(address).hostname for address in addresses} | {"localhost", machine, f"{machine}.local"}
        return name in known or bool(ip_address(name))
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    timeout = 60.0  # seconds without data until a connection is closed

    def __init__(self, *args: Any, kit_server: KitServer, roots: dict[str, Path]) -> None:
        self.kit_server, self.roots = kit_server, roots
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        """Log no requests."""

    def do_GET(self) -> None:
        file = self._requested_file()
        if file is None:
            self.send_error(404)
            return
        self._send_headers(200, MIME.get(file.suffix, "application/octet-stream"), file.stat().st_size)
        with file.open("rb") as source, suppress(BrokenPipeError, ConnectionResetError):
            shutil.copyfileobj(source, self.wfile)

    def do_POST(self) -> None:
        what, length = self._path_after_token(), self.headers.get("Content-Length", "")
        if what not in ("progress", "results", "failed") or not length.isdecimal() or int(length) > LARGEST_POST:
            self.send_error(403)
            return
        self.kit_server.messages.put((what, self.rfile.read(int(length)).decode(errors="replace")))
        self._send_headers(204, "text/plain", 0)

    def _path_after_token(self) -> str | None:
        """Return the path without the token; None if the token is wrong or the request is for another host."""
        try:
            _, token, path = unquote(urlsplit(self.path).path).split("/", 2)
        except ValueError:
            return None
        token_matches = hmac.compare_digest(token.encode(), self.kit_server.token.encode())
        host_matches = _names_this_machine(self.headers.get("Host", ""), self.kit_server.addresses)
        return path if token_matches and host_matches else None

    def _requested_file(self) -> Path | None:
        """Return the requested file; None if it does not exist or is outside the served folders."""
        path = self._path_after_token()
        if path is None:
            return None
        first, _, tail = path.partition("/")
        root, name = (self.roots[first], tail) if first in ("kit", "ort") else (self.roots[""], path or "index.html")
        try:
            file = (root / name).resolve()
            return file if file.is_file() and root.resolve() in file.parents else None
        except (OSError, ValueError):  # not a valid file name
            return None

    def _send_headers(self, status: int, kind: str, length: int) -> None:
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
