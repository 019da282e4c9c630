"""Where to measure, and how to reach it."""

import re
from dataclasses import dataclass
from pathlib import Path

from converters.errors import InputError
from prehab_export.system import usable_cores


@dataclass(frozen=True)
class Target:
    """Where to measure, and how.

    name: ``local``, ``kit:FOLDER``, ``ssh://user@host:port``, ``adb``, ``adb:SERIAL`` or ``browser``.
    python: the interpreter on another machine; keep: leave the kit there.
    pin: run on so many cores only; memory_mb: with so much memory; both local.
    matrix_memory_mb: sizes of the table threads × memory; none for no table.
    browser: the browser's command; web: the dist folder of onnxruntime-web; by_hand: serve the page at host and port
        to whoever opens it, until interrupted.
    """

    name: str
    python: str = "python3"
    keep: bool = False
    cooldown_s: float = 0.0
    pin: int | None = None
    memory_mb: float | None = None
    matrix_memory_mb: tuple[float, ...] = ()
    browser: str | None = None
    web: Path | None = None
    by_hand: bool = False
    host: str = "127.0.0.1"
    port: int = 0

    def __post_init__(self) -> None:
        if not re.match(r"(local$|kit:.|ssh://|adb(:|$)|browser$)", self.name):
            raise InputError(
                f"--target must be local, kit:FOLDER, ssh://user@host, adb[:serial] or browser, not {self.name!r}"
            )
        if self.name != "local" and (self.pin or self.memory_mb or self.matrix_memory_mb):
            raise InputError("--pin-cores, --memory-limit and --matrix are for --target local")
        if self.name != "browser" and (self.browser or self.web or self.by_hand):
            raise InputError("--browser, --ort-web and --by-hand are for --target browser")
        if self.cooldown_s < 0:
            raise InputError(f"--cooldown must be 0 or more seconds, not {self.cooldown_s}")
        if self.memory_mb is not None and not self.memory_mb > 0:
            raise InputError(f"--memory-limit {self.memory_mb} leaves nothing to run in; give megabytes above 0")
        if any(size <= 0 for size in self.matrix_memory_mb):
            raise InputError("--matrix takes megabytes above 0")
        if self.pin is not None and not 1 <= self.pin <= len(usable_cores()):
            raise InputError(f"--pin-cores must lie between 1 and {len(usable_cores())}, the cores of this process")
