"""Options of measurement on a target."""

import re
from dataclasses import dataclass
from pathlib import Path

from converters.errors import InputError
from prehab_export.system import usable_cores


@dataclass(frozen=True)
class Target:
    """Where to measure, and how.

    name: ``local``, ``kit:FOLDER``, ``ssh://user@host:port``, ``adb``, ``adb:SERIAL`` or ``browser``.
    python: Python interpreter on another machine.
    keep: leave the kit on the other machine.
    cooldown_s: seconds of rest before each turn.
    pin: number of cores to run on; all when None. Local only.
    memory_mb: memory limit in 10⁶ bytes; no limit when None. Local only.
    matrix_memory_mb: memory limits of the table threads × memory; no table when empty. Local only.
    browser: command of the browser.
    web: ``dist`` folder of onnxruntime-web.
    by_hand: serve the page for any browser, until interrupted.
    host: address to serve the page at.
    port: port to serve the page at; 0 for a free one.

    Raises:
        InputError: the name is no target, an option does not apply to it, or a value is out of range.
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
            raise InputError(f"--memory-limit {self.memory_mb} leaves nothing to run in; give more than 0 megabytes")
        if any(size <= 0 for size in self.matrix_memory_mb):
            raise InputError("--matrix takes numbers of megabytes above 0")
        if self.pin is not None and not 1 <= self.pin <= len(usable_cores()):
            raise InputError(f"--pin-cores must lie between 1 and {len(usable_cores())}, the cores of this process")
