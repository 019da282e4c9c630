"""A headless Chromium: find it on this machine, start it with a temporary profile, and kill it at the end."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from converters.errors import InputError
from prehab_export.system import die_with_parent, environment, find_program, kill_process_tree

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


def find_browser(name: str | None) -> str:
    """Return the path of a browser.

    Args:
        name: command of the browser; when None, the usual commands of Chromium, Chrome and Edge are tried.

    Raises:
        InputError: this machine has no such browser.
    """
    candidates = (name,) if name else BROWSERS
    path = next((path for candidate in candidates if (path := find_program(candidate))), None)
    if path is None:
        raise InputError(
            f"there is no {name or 'Chromium or Chrome'} here; install one, name it with --browser, or open the page "
            "in any browser with --by-hand"
        )
    return path


@contextmanager
def headless_chromium(command: str, address: str) -> Iterator[subprocess.Popen]:
    """Run a headless browser in its own process group, with a temporary profile; both are removed at the end."""
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
    """Return whether Chromium can use its sandbox. As root on Linux it cannot, and needs ``--no-sandbox``."""
    return not (sys.platform == "linux" and os.geteuid() == 0)
