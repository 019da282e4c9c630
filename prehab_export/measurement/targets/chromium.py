"""A headless Chromium: found on this machine, started with a profile of its own, and gone at the end."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from converters.errors import InputError
from prehab_export.system import die_with_parent, environment, find_program, kill_process_tree

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


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


@contextmanager
def headless_chromium(command: str, address: str) -> Iterator[subprocess.Popen]:
    """A headless browser in a group of its own, with a profile of its own; all of it is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="prehab-export-browser-", ignore_cleanup_errors=True) as profile:
        arguments = [
            "--headless=new",
            *([] if can_sandbox() else ["--no-sandbox"]),
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


def can_sandbox() -> bool:
    """Chromium on Linux has no sandbox for root, and does not start unless told that it may go without."""
    return not (sys.platform == "linux" and os.geteuid() == 0)
